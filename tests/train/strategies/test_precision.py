"""The choice of arithmetic: asked for, known or measured, and without a trace on the module."""

import pytest
import pytorch_lightning as pl
import torch
from modules import UserModule

from orchestrator.config import Precision
from orchestrator.train.strategies.precision import choose_precision, lightning_precision

CPU = torch.device("cpu")


class WithoutForward(pl.LightningModule):
    pass


@pytest.mark.parametrize("requested", ["32", "bf16"])
def test_what_is_asked_for_is_taken(requested: Precision) -> None:
    choice = choose_precision(requested, WithoutForward(), device=CPU, batch=2, image_size=8)
    assert str(choice) == f"{requested}: asked for"


def test_measuring_leaves_the_module_and_the_random_numbers_alone() -> None:
    module = UserModule(num_classes=3)
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    choice = choose_precision("auto", module, device=CPU, batch=4, image_size=8)
    assert choice.value in ("32", "bf16")
    assert choice.reason
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_that_cannot_be_tried_gets_exact_arithmetic() -> None:
    choice = choose_precision("auto", WithoutForward(), device=CPU, batch=2, image_size=8)
    assert choice.value == "32"


def test_fp16_without_a_gpu_is_replaced_and_said() -> None:
    choice = choose_precision("16", WithoutForward(), device=CPU, batch=2, image_size=8)
    assert choice.value == "bf16"
    assert "16 was asked for" in choice.reason


def test_lightning_knows_the_names() -> None:
    for value in ("32", "bf16"):
        name = lightning_precision(value)
        assert pl.Trainer(precision=name, logger=False).precision == name
