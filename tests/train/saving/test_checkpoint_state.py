"""What a checkpoint holds comes back bit for bit: weights, averages, optimizers, schedules."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import safetensors.numpy
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn

from orchestrator.config import UserError
from orchestrator.train.saving import state
from orchestrator.train.saving.snapshot import Snapshots
from orchestrator.train.strategies.strategy import DDPStrategy
from orchestrator.train.strategies.tensors import WEIGHTS_FILE, read_weights

STEPS, SAVED = 7, 4


class Alone(SingleDeviceStrategy):
    """What our DDP does for checkpoints, in one process without a group."""

    weights = DDPStrategy.weights
    optimizer_states = DDPStrategy.optimizer_states
    shards = DDPStrategy.shards
    load_shards = DDPStrategy.load_shards


class Counted(nn.Module):
    """Keeps something else than tensors in its state dict, as quantizers and metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Averaged(pl.LightningModule):
    """A user's module with batch norm, averaged weights, a schedule and a note of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Counted(), nn.Dropout(0.5))
        self.note = ""

    def configure_callbacks(self) -> list[pl.Callback]:
        return [EMAWeightAveraging(decay=0.7)]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=STEPS + 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        state.seed_step(0, self.trainer.global_step, 0)
        self.note = f"step {self.trainer.global_step}"
        x = torch.full((3, 4), float(self.trainer.global_step)) + torch.randn(3, 4)
        return self.net(x).square().sum()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = self.note

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["note"]


@dataclasses.dataclass
class Saves(pl.callbacks.Checkpoint):
    """Saves after one step; restores where it is given a folder."""

    folder: Path
    resumed: Path | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed:
            state.set_progress(trainer, step=SAVED, epoch=0)
            state.restore_state(trainer, self.resumed)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED and not self.resumed:
            self.folder.mkdir()
            captured = state.capture_state(trainer)
            state.check_readable(captured)
            state.write_state(Snapshots().take(captured), self.folder)


def fit(saves: Saves, *, steps: int) -> dict[str, Any]:
    """Train; return all there is at the end: live weights, their average, optimizer, schedule."""
    pl.seed_everything(7, verbose=False)
    module = Averaged()
    trainer = pl.Trainer(
        strategy=Alone("cpu"), max_epochs=1, callbacks=[saves], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    ended: dict[str, Any] = {}

    class End(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            average = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))
            ended.update(
                weights=Snapshots().take(pl_module.state_dict()),
                average=Snapshots().take(average._average_model.state_dict()),
                optimizer=Snapshots().take(trainer.optimizers[0].state_dict()),
                schedule=trainer.lr_scheduler_configs[0].scheduler.state_dict(),
                note=pl_module.note,
            )

    trainer.callbacks.insert(0, End())
    trainer.fit(module, torch.utils.data.DataLoader([0] * steps))
    return ended


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {prefix: value.tolist() if isinstance(value, torch.Tensor) else value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}/{key}").items()}


@pytest.mark.filterwarnings("ignore")
def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = fit(Saves(tmp_path / "saved"), steps=STEPS)
    resumed = fit(Saves(tmp_path / "unused", tmp_path / "saved"), steps=STEPS - SAVED)
    assert flat(resumed) == flat(undisturbed)
    assert undisturbed["note"] == f"step {STEPS - 1}"
    # What is validated is the average; so it is what `weights` holds, for evaluation and others.
    averaged = read_weights(tmp_path / "saved")
    assert averaged["net.2._extra_state"] == {"calls": 0}  # of the average, which never ran
    plain = safetensors.numpy.load_file(tmp_path / "saved" / WEIGHTS_FILE)
    assert all(np.array_equal(plain[name], averaged[name].numpy()) for name in plain)
    assert not any(name.endswith("_extra_state") for name in plain)


def test_a_snapshot_is_a_copy_in_buffers_that_are_used_again() -> None:
    snapshots = Snapshots()
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    live = {"a": weight, "b": [nn.Parameter(torch.ones(3)), (1, "x")], "c": {1: {"lr": 0.1}}}
    first = snapshots.take(live)
    assert torch.equal(first["a"], weight)
    assert first["a"].stride() == weight.stride()
    pointers = first["a"].data_ptr(), first["b"][0].data_ptr()
    weight += 1
    live["c"][1]["lr"] = 0.2
    assert not torch.equal(first["a"], weight)
    assert first["c"] == {1: {"lr": 0.1}}
    second = snapshots.take(live)
    assert (second["a"].data_ptr(), second["b"][0].data_ptr()) == pointers
    assert torch.equal(second["a"], weight)
    assert second["b"][1] == (1, "x")
    assert snapshots.num_bytes == (96 + 3) * 4
    other = snapshots.take({"a": torch.zeros(5)})
    assert other["a"].shape == (5,)
    assert snapshots.num_bytes == 20


def test_what_would_run_code_when_it_is_loaded_is_refused_before_it_is_saved() -> None:
    class Custom:
        pass

    good = {"trainer.pt": {"a": torch.ones(1000), "b": [1, "x", None]}}
    state.check_readable(good)
    with pytest.raises(UserError, match=r"trainer\.pt holds more than tensors and primitives"):
        state.check_readable({"trainer.pt": {"module": {"x": Custom()}}})
    with pytest.raises(UserError, match=r"convert it in the module's on_save_checkpoint"):
        state.check_readable({"trainer.pt": {"module": {"x": pl.Trainer}}})
