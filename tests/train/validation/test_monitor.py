"""Whether a metric is ever logged: what a module's source says, and what a run does without."""

import dataclasses
from pathlib import Path
from typing import Any

import bare
import pytest
import pytorch_lightning as pl
import torch
from bare import Start
from packed import write_packed

from orchestrator.config import (
    BesideConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    ValidateConfig,
)
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation import monitor
from orchestrator.train.validation.monitor import logged_names


class Trains(pl.LightningModule):
    """It has no validation."""

    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(batch).sum()
        self.log("train_loss", torch.log(loss))
        return loss


class Literal(Trains):
    """All that it logs has a name in its source."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(name="val_f1", value=0.5)

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val_loss": 0.1, "val_acc": self.scale}, sync_dist=True)


class Computed(Literal):
    """One name is put together."""

    def on_validation_epoch_start(self) -> None:
        for stage in ("val", "test"):
            self.log(f"{stage}_loss", 0.0)


class HandsOn(Literal):
    """A function gets the module."""

    def on_validation_epoch_start(self) -> None:
        log_elsewhere(self)


class Renamed(Literal):
    """Its own `log` is called by another name."""

    def on_validation_epoch_start(self) -> None:
        write = self.log
        write("more", 1.0)


class Other(Literal):
    """It does not call itself self."""

    def on_validation_epoch_start(me) -> None:
        log_elsewhere(me)


def log_elsewhere(module: pl.LightningModule) -> None:
    module.log("more", 1.0)


class Borrowed(Literal):
    """A method of it stands elsewhere."""

    on_validation_epoch_start = log_elsewhere  # type: ignore[assignment]


class WithCallbacks(Literal):
    """Its callbacks may log."""

    def configure_callbacks(self) -> list[pl.Callback]:
        return []


def test_names_are_known_where_all_stand_in_the_source() -> None:
    assert logged_names(Trains) == ["train_loss"]
    assert logged_names(Literal) == ["train_loss", "val_acc", "val_f1", "val_loss"]


@pytest.mark.parametrize(
    "module", [Computed, HandsOn, Renamed, Other, Borrowed, WithCallbacks, type("Made", (), {})]
)
def test_what_may_log_more_is_not_judged(module: type[pl.LightningModule]) -> None:
    assert logged_names(module) is None


def make_config(module: str, watched: str, **validate: Any) -> Config:
    return Config(
        name="run",
        model=ModelConfig(class_path=module),
        train=TrainConfig(
            early_stopping=EarlyStoppingConfig(monitor=watched) if watched else None,
            validate=ValidateConfig(**validate),
        ),
    )


CLASSIFIER = "orchestrator.train.module.ImageClassifier"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (make_config("test_monitor.Literal", "val_los"), "'val_los' is never .*mean 'val_loss'"),
        (make_config("test_monitor.Literal", "psnr"), "logs train_loss, val_acc, .*; name what"),
        (make_config("test_monitor.Trains", "val_loss"), r"early_stopping needs .* no validation_"),
        (make_config("test_monitor.Trains", "", every_samples=9), r"every_samples needs valid"),
        (make_config(CLASSIFIER, "train_loss", beside=BesideConfig()), "never logged.* val_loss"),
    ],
)
def test_a_run_that_can_never_be_judged_is_refused(config: Config, said: str) -> None:
    with pytest.raises(UserError, match=said):
        monitor.check(config)


def test_what_may_be_logged_is_let_pass() -> None:
    for module, watched in (
        ("Literal", "val_f1"),
        ("Literal", "train_loss_epoch"),
        ("Computed", "psnr"),
        ("Trains", ""),
    ):
        monitor.check(make_config(f"test_monitor.{module}", watched))
    monitor.check(make_config(CLASSIFIER, "train_loss"))


@pytest.mark.parametrize(("every_samples", "step"), [(18, 3), (None, 7)])
def test_where_it_shows_at_the_first_validation_only_nothing_is_lost(
    tmp_path: Path, every_samples: int | None, step: int
) -> None:
    index = write_packed(tmp_path / "data", train=40, val=9)
    wrong = Config(
        name="run",
        storage_path=str(tmp_path),
        data=DataConfig(index=index.uri, global_batch=6, eval_batch=2, image_size=8),
        model=ModelConfig(class_path="modules.UserModule", init_args={"num_classes": 3}),
        train=TrainConfig(
            max_epochs=1,
            strategy="ddp",
            precision="32",
            early_stopping=EarlyStoppingConfig(monitor="val_los"),
            validate=ValidateConfig(every_samples=every_samples),
            checkpoint=CheckpointConfig(every_seconds=None),
        ),
    )
    right = dataclasses.replace(
        wrong, train=dataclasses.replace(wrong.train, early_stopping=EarlyStoppingConfig())
    )
    run = str(tmp_path / "run")
    Path(run).mkdir()
    (ended,), *_ = bare.train(1, Start(run=run, config=wrong))
    assert "'val_los' was not logged" in ended.error
    kept = checkpoint.list_manifests(run)[-1]
    assert kept.step == step
    if every_samples is None:  # the run was over
        assert (kept.done, set(kept.metrics)) == ("max_epochs", {"val_loss"})
        return
    assert (kept.done, kept.metrics) == ("", {})
    bare.train(1, Start(run=run, config=right))
    assert checkpoint.list_manifests(run)[-1].stopping["validations"] == 3  # 3, 6, 7
