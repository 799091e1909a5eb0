"""Which strategy is chosen, by which arithmetic, and what is refused before anything starts."""

import dataclasses
import re
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from orchestrator.config import Config, ModelConfig, ScalingConfig, TrainConfig, UserError
from orchestrator.train.strategies import choose
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.strategies.choose import (
    DeviceMemory,
    check_hardware,
    choose_here,
    choose_strategy,
)
from orchestrator.train.strategies.size import Unmeasured, _is_elementwise, _states, measure

OURS = "orchestrator.train.module.ImageClassifier"


class Plain(pl.LightningModule):
    """250,000 weights and an optimizer by name."""

    def __init__(self, optimizer: str = "AdamW", **options: Any) -> None:
        super().__init__()
        self.net = nn.Linear(500, 500, bias=False)
        self.optimizer, self.options = optimizer, options

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.1, **self.options)


class Two(Plain):
    """Two optimizers, as of a GAN."""

    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers(), super().configure_optimizers()]


class Schedules(Plain):
    """Two schedules of one optimizer, as Lightning takes them without DeepSpeed."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 1), StepLR(optimizer, 2)]


class Clips(Plain):
    """Clips in a way of its own."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        pass


class Cycles(Plain):
    """Asks the trainer how long the run is."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        total = self.trainer.estimated_stepping_batches
        assert total > self.trainer.max_epochs
        return [optimizer], [OneCycleLR(optimizer, 0.1, int(total), cycle_momentum=False)]


class Asks(Plain):
    """Asks for more than is known beforehand."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.trainer.datamodule.sizes else None


class ByNorm(torch.optim.SGD):
    """Steps as far as a weight is long, as LARS does, in groups that ask for it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                trust = 0.001 * weight.norm() / weight.grad.norm() if group["adapt"] else 1.0
                weight -= group["lr"] * trust * weight.grad


class WarmsUp(Plain):
    """Begins at a learning rate of 0; its first group is stepped as by SGD."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [], "adapt": False},
            {"params": list(self.parameters()), "adapt": True},
        ]
        optimizer = ByNorm(groups, lr=0.1)
        return [optimizer], [LambdaLR(optimizer, lambda step: min(1.0, step / 1000))]


class OnGpusOnly(torch.optim.SGD):
    """Steps by kernels that a CPU does not have."""

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


class Apart(Plain):
    def configure_optimizers(self) -> Any:
        return OnGpusOnly(self.parameters(), lr=0.1)


class Reader(Plain):
    """Reads a value of a tensor while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.ones(1).sum())


def config(
    name: str = "",
    *,
    strategy: str = "auto",
    workers: int = 2,
    gpus: float = 0,
    offload: bool = False,
    **args: Any,
) -> Config:
    path = f"{__name__}.{name}" if name else OURS
    return Config(
        model=ModelConfig(class_path=path, init_args=args),
        train=TrainConfig(strategy=strategy, offload_optimizer=offload),  # type: ignore[arg-type]
        scaling=ScalingConfig(num_workers=workers, gpus_per_worker=gpus),
    )


def test_a_model_is_measured_without_its_memory() -> None:
    found = measure(ModelConfig(init_args={"arch": "tiny_resnet"}), num_classes=3)
    module_class = measure(ModelConfig(class_path=f"{__name__}.Plain"), num_classes=3)
    assert found.size.parameters == found.size.trainable > 300_000
    assert (module_class.size.parameters, module_class.size.states) == (250_000, 2.0)
    with pytest.raises(Unmeasured, match="cannot be built without memory"):
        measure(ModelConfig(class_path=f"{__name__}.Reader"), num_classes=3)


@pytest.mark.parametrize(
    ("name", "options", "states", "elementwise"),
    [
        ("SGD", {}, 0, True),
        ("SGD", {"momentum": 0.9, "nesterov": True}, 1, True),
        ("Adam", {"amsgrad": True}, 3, True),
        ("RMSprop", {"momentum": 0.9, "centered": True}, 3, True),
        ("Muon", {}, 1, False),
        ("Adafactor", {}, 5 / 6, False),
        ("LBFGS", {}, 2, False),
        ("Adagrad", {}, 1, True),
    ],
)
def test_what_an_optimizer_keeps_is_found_by_trying(
    name: str, options: dict[str, Any], states: float, elementwise: bool
) -> None:
    optimizer = Plain(name, **options).configure_optimizers()
    assert _states(optimizer) == pytest.approx(states)
    assert _is_elementwise(optimizer) is elementwise


def test_auto_takes_the_first_that_fits_and_shows_its_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # ddp: 250,000 * (4 + 4 + 8 + 4) = 5.0 MB; zero2 on 100 workers: 1.0 + 0.04 + 2.0 of buffers.
    for limit, taken in ((5.1e6, "ddp"), (3.9e6, "zero2"), (1e3, "zero3")):
        there = DeviceMemory(int(limit / choose._SHARE_FOR_STATES), "a device")
        monkeypatch.setattr(choose, "device_memory", lambda scaling, there=there: there)
        choice = choose_strategy(config("Plain", workers=100), num_classes=3)
        assert choice.value == taken
        assert "ddp takes 5.0 MB a worker" in choice.reason
    assert "none fits" in choice.reason
    assert choose_strategy(config("Plain", workers=1), num_classes=3).value == "ddp"
    resumed = choose_strategy(config("Plain"), num_classes=3, resumed="zero2")
    assert str(resumed) == "zero2: as before the resume"


def test_auto_stays_with_ddp_where_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Reader cannot be built" in choose_strategy(config("Reader"), num_classes=3).reason
    there = DeviceMemory(1, "a device")
    monkeypatch.setattr(choose, "device_memory", lambda scaling: there)
    for name in ("Two", "Schedules", "Clips", "Asks", "Apart"):
        assert choose_strategy(config(name), num_classes=3).value == "ddp"
    choice = choose_strategy(config("Plain", optimizer="Adafactor"), num_classes=3)
    assert choice.value == "ddp"
    assert "so Adafactor of " in choice.reason


def test_an_optimizer_that_is_not_known_is_taken_for_adam_and_said() -> None:
    found = measure(config("Asks").model, num_classes=3)
    assert (found.size.optimizer, found.size.states) == ("an assumed Adam", 2.0)
    assert measure(config("Apart").model, num_classes=3).size.optimizer == "OnGpusOnly"
    for name, said in (("Asks", "cannot be run"), ("Apart", "OnGpusOnly of .* cannot be tried")):
        assert re.search(f"{said} beforehand .*an Adam is assumed, which", auto_of(name).reason)
        # Who asks for ZeRO is believed.
        asked = choose_strategy(config(name, strategy="zero1"), num_classes=3)
        assert re.search(f"^zero1: asked for; .*{said} beforehand", str(asked))


def auto_of(name: str, **options: Any) -> Choice:
    return choose_strategy(config(name, **options), num_classes=3)


def test_workers_decide_where_the_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "device_memory", lambda scaling: None)
    for options in ({}, {"offload": True}):
        there = config("Plain", workers=100, gpus=1, **options)
        left = choose_strategy(there, num_classes=3)
        assert str(left) == "auto: the workers' GPUs decide: there is none here"
        # A worker without a GPU, whatever the config says.
        here = choose_here(there, num_classes=3)
        assert here.value == ("zero1" if options else "ddp")
    assert auto_of("Plain", gpus=1, workers=1).value == "ddp"
    assert auto_of("Two", gpus=1).value == "ddp"
    tight = DeviceMemory(int(3.9e6 / choose._SHARE_FOR_STATES), "a device")
    monkeypatch.setattr(choose, "device_memory", lambda scaling: tight)
    assert choose_here(config("Plain", workers=100), num_classes=3).value == "zero2"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Two", {}, "one optimizer but .* configures 2; set train.strategy to ddp"),
        ("Plain", {"optimizer": "Muon"}, "Muon of .* would compute something else"),
        ("Cycles", {"optimizer": "Adafactor"}, "Adafactor of .* would compute something else"),
        ("WarmsUp", {}, "ByNorm of .* would compute something else"),
        ("Plain", {"optimizer": "Adagrad"}, "DeepSpeed replaces Adagrad of .* by one of its own"),
        ("Schedules", {}, "one learning-rate schedule but .* configures 2; set train.strategy"),
        ("Clips", {}, "DeepSpeed does itself what .*Clips.configure_gradient_clipping does"),
    ],
)
def test_what_zero_cannot_train_is_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_strategy(config(name, strategy="zero1", **args), num_classes=3)
    assert choose_strategy(config(name, strategy="ddp", **args), num_classes=3).value == "ddp"
    for trained in ("Plain", "Cycles"):
        assert str(auto_of(trained, strategy="zero1")) == "zero1: asked for"
    unmeasured = str(auto_of("Reader", strategy="zero1"))
    assert "cannot be built without memory (" in unmeasured
    assert unmeasured.endswith("so that nothing else was checked")


def test_offloading_is_refused_where_there_is_nothing_to_move() -> None:
    asked = config(strategy="zero2")
    asked = dataclasses.replace(
        asked, train=dataclasses.replace(asked.train, offload_optimizer=True)
    )
    with pytest.raises(UserError, match="where they are already"):
        check_hardware(asked)
    on_gpus = dataclasses.replace(asked, scaling=ScalingConfig(gpus_per_worker=1))
    check_hardware(on_gpus)
    ddp = dataclasses.replace(on_gpus.train, strategy="ddp")
    with pytest.raises(UserError, match="needs ZeRO"):
        check_hardware(dataclasses.replace(on_gpus, train=ddp))


def test_offloading_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = DeviceMemory(1 << 40, "a device")
    monkeypatch.setattr(choose, "device_memory", lambda scaling: plenty)
    offloaded = config("Plain", gpus=1, offload=True)
    assert auto_of("Plain", gpus=1).value == "ddp"
    for name in ("Plain", "Reader", "Asks"):
        assert auto_of(name, gpus=1, offload=True).value == "zero1"
    assert choose_strategy(offloaded, num_classes=3, resumed="zero2").value == "zero2"
    with pytest.raises(UserError, match=r"the run's checkpoint is of ddp, .*; leave it out"):
        choose_strategy(offloaded, num_classes=3, resumed="ddp")
    with pytest.raises(UserError, match=r"offload_optimizer=true needs ZeRO: .* configures 2; set"):
        auto_of("Two", gpus=1, offload=True)
