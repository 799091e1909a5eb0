"""The choice of arithmetic: asked for, known or measured, and without a trace on the module."""

import pytest
import pytorch_lightning as pl
import torch
from modules import UserModule

from orchestrator.config import Precision
from orchestrator.train.strategies import precision
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.strategies.precision import choose_precision, lightning_precision

CPU = torch.device("cpu")


class WithoutForward(pl.LightningModule):
    pass


@pytest.mark.parametrize("requested", ["32", "bf16"])
def test_what_is_asked_for_is_taken(requested: Precision) -> None:
    choice = choose_precision(requested, WithoutForward(), device=CPU, batch=2, image_size=8)
    assert str(choice) == f"{requested}: asked for"


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any CPU count as one that might gain."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


def auto(module: pl.LightningModule, device: torch.device = CPU) -> Choice:
    return choose_precision("auto", module, device=device, batch=4, image_size=8)


@pytest.mark.usefixtures("bf16_units")
def test_measuring_leaves_the_module_and_the_random_numbers_alone() -> None:
    module = UserModule(num_classes=3)
    module.train()
    frozen = next(module.children()).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    choice = auto(module)
    assert choice.value in ("32", "bf16")
    assert "measured" in choice.reason
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert not frozen.training  # which its user put in evaluation mode
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.usefixtures("bf16_units")
@pytest.mark.parametrize(("gain", "taken"), [(1.19, "32"), (1.2, "bf16"), (0.8, "32")])
def test_bf16_must_gain_more_than_noise(
    monkeypatch: pytest.MonkeyPatch, gain: float, taken: str
) -> None:
    # The first pair compiles kernels, and the one before the last was disturbed.
    fp32 = iter([9.0, gain, 50.0, gain])
    monkeypatch.setattr(
        precision, "_seconds", lambda module, image, low: 1.0 if low else next(fp32)
    )
    choice = auto(UserModule(num_classes=3))
    assert choice.value == taken
    assert f"measured {gain:.2f}x as fast" in choice.reason


@pytest.mark.usefixtures("bf16_units")
def test_a_module_that_cannot_be_tried_gets_exact_arithmetic() -> None:
    choice = auto(WithoutForward())
    assert str(choice) == "32: forward could not be tried beforehand (NotImplementedError)"


def test_a_cpu_without_bf16_units_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert str(auto(WithoutForward())) == "32: no GPU, and this CPU has no bf16 units (AMX)"


@pytest.mark.parametrize(
    ("native", "said"),
    [
        (True, "bf16: a card computes bf16 natively"),
        (False, "16: a card has no native bf16; fp16 with loss scaling"),
    ],
)
def test_gpus_are_known(monkeypatch: pytest.MonkeyPatch, native: bool, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    gpu = torch.device("cuda", 0)
    assert str(auto(WithoutForward(), gpu)) == said
    asked = choose_precision("16", WithoutForward(), device=gpu, batch=4, image_size=8)
    assert str(asked) == "16: asked for"


def test_fp16_without_a_gpu_is_replaced_and_said() -> None:
    choice = choose_precision("16", WithoutForward(), device=CPU, batch=2, image_size=8)
    assert choice.value == "bf16"
    assert "16 was asked for" in choice.reason


def test_lightning_knows_the_names() -> None:
    for value in ("32", "bf16"):
        name = lightning_precision(value)
        assert pl.Trainer(precision=name, logger=False).precision == name
    assert lightning_precision("16") == "16-mixed"
