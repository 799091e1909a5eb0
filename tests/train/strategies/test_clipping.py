"""A step's clipped update in one process, in every precision: fp16 with loss scaling too."""

import functools

import pytest
import pytorch_lightning as pl
import torch
from numeric_modules import Plain
from pytorch_lightning.plugins import MixedPrecision, Precision
from torch.utils.data import DataLoader

from orchestrator.train.strategies.precision import lightning_precision

CLIP = 0.05


class Autocast(Plain):
    """Leaves the precision to autocast, as modules do outside of DeepSpeed."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image).float()


def plugin(precision: str) -> Precision:
    if precision == "32":
        return Precision()
    # Lightning's own flag takes bf16 for fp16 on CPUs; PyTorch's autocast and scaler know both.
    scaler = torch.amp.GradScaler("cpu") if precision == "16" else None
    name = lightning_precision(precision)
    assert name != "32-true"
    return MixedPrecision(name, "cpu", scaler)


@functools.cache
def update(precision: str, *, clip: float | None = CLIP, scale: float = 10.0) -> torch.Tensor:
    """Return how far one step of SGD with lr 1 went: its gradient, clipped."""
    module = Autocast(scale=scale)
    start = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 8, 8, generator=generator)
    batch = {"image": image, "label": torch.arange(8) % 3, "id": [""] * 8}
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[plugin(precision)],
        max_steps=1,
        gradient_clip_val=clip,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return start - torch.nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_the_gradient_itself_is_clipped_and_not_the_scaled_one(precision: str) -> None:
    whole = update("32", clip=None)
    assert float(whole.norm()) > 20 * CLIP
    clipped = update(precision)
    # A scaled gradient that is clipped to 0.05 would be 65,536 times as short after unscaling.
    assert float(clipped.norm()) == pytest.approx(CLIP, rel=1e-4)
    expected = whole * CLIP / whole.norm()
    rounding = {"32": 1e-7, "bf16": 1e-3, "16": 1e-3}[precision]
    torch.testing.assert_close(clipped, expected, rtol=0, atol=rounding)


def test_a_step_whose_scaled_gradient_overflows_is_skipped() -> None:
    assert float(update("16", scale=1e6).abs().max()) == 0
    assert float(update("bf16", scale=1e6).norm()) == pytest.approx(CLIP, rel=1e-4)
