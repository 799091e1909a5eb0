"""LightningModules as users write them, named by `class_path` in tests."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
import torch
from torch import nn
from torch.nn import functional

from orchestrator.train.loop.recorder import Recorder


class UserModule(pl.LightningModule):
    """A plain module with batch norm and dropout: state and randomness that a resume must keep."""

    def __init__(self, num_classes: int, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32, num_classes),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert len(batch["id"]) == len(batch["image"])
        return functional.cross_entropy(self(batch["image"]).float(), batch["label"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = functional.cross_entropy(self(batch["image"]).float(), batch["label"])
        self.log("val_loss", loss, batch_size=len(batch["id"]), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Noisy(UserModule):
    """Augments by random numbers before its training step, as modules with Kornia do."""

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return {**batch, "image": batch["image"] + torch.randn_like(batch["image"])}


class _Once(UserModule):
    """Does something at one step, the first time it gets there."""

    def __init__(self, num_classes: int, marker: str, at_step: int, lr: float = 0.01) -> None:
        super().__init__(num_classes, lr)
        self.marker = Path(marker)
        self.at_step = at_step

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        last = self.trainer.global_rank == self.trainer.world_size - 1
        if last and self.trainer.global_step == self.at_step and not self.marker.exists():
            self.marker.touch()
            self.happen()
        return super().training_step(batch, batch_idx)

    def happen(self) -> None:
        raise NotImplementedError


class KilledOnce(_Once):
    """Its last worker is killed by SIGKILL."""

    def happen(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailsOnce(_Once):
    """Its last worker raises."""

    def happen(self) -> None:
        raise ArithmeticError("the loss went to pieces")


class NoDropout(FailsOnce):
    """Neither dropout nor batch norm: what it learns does not depend on the world size.

    It learns by plain SGD, which shows a wrongly scaled gradient; Adam would hide it.
    """

    def __init__(self, num_classes: int, marker: str, at_step: int, lr: float = 0.01) -> None:
        super().__init__(num_classes, marker, at_step, lr)
        self.net[1] = nn.Identity()
        self.net[5] = nn.Identity()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Slow(UserModule):
    """Takes its time until a folder holds "fast"; leaves its steps and workers' nodes there."""

    def __init__(self, num_classes: int, folder: str, step_s: float) -> None:
        super().__init__(num_classes)
        self.folder = Path(folder)
        self.step_s = step_s

    def on_train_start(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"rank-{self.trainer.global_rank}").write_text(node)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if not (self.folder / "fast").exists():
            time.sleep(self.step_s)
        if self.trainer.global_rank == 0:
            with (self.folder / "steps").open("a") as file:
                file.write(f"{self.trainer.global_step}\n")
        return super().training_step(batch, batch_idx)


class ValidatesSlowly(Slow):
    """Takes its time for a batch of a validation, too, and leaves "validating" there."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        (self.folder / "validating").touch()
        if not (self.folder / "fast").exists():
            time.sleep(1.0)
        super().validation_step(batch, batch_idx)


class NeverImproves(UserModule):
    """Its validation loss only grows."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch), batch_size=len(batch["id"]), sync_dist=True)


class Validated(UserModule):
    """Its validation loss falls with the steps done until step 10; then it is 1."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        step = self.trainer.global_step
        loss = 1 / (1 + step) if step <= 10 else 1.0
        self.log("val_loss", loss, batch_size=len(batch["id"]), sync_dist=True)


class KilledAtSeven(Validated):
    """Ends after the validation of step 7, in front of the commit."""

    def on_validation_epoch_end(self) -> None:
        if self.trainer.global_step == 7:
            raise KeyError("killed")


class PausedAtSeven(Validated):
    """Commits after step 7, as at a preemption's notice, and ends."""

    def on_train_batch_end(self, *_: Any) -> None:
        recorder = next(c for c in self.trainer.callbacks if isinstance(c, Recorder))
        if recorder.step == 7:
            recorder.commit(self.trainer, metrics={}, done="", must=True)
            assert recorder.committer.finish() == 7
            raise KeyError("paused")


class Stumbles(_Once):
    """Its last worker once sleeps in a step for ever; two steps later it always raises."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.at_step + 2:
            raise Peculiar(self.at_step, "this sample is odd")
        return super().training_step(batch, batch_idx)

    def happen(self) -> None:
        time.sleep(3600)


class Peculiar(Exception):
    """Only the worker knows this class, and it cannot be read back."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)


class KilledBeside(UserModule):
    """Killed by SIGKILL at its first validation, and once in training; it never improves."""

    def __init__(self, num_classes: int, markers: str, step_s: float) -> None:
        super().__init__(num_classes)
        self.markers = Path(markers)
        self.step_s = step_s

    def _die_once(self, marker: str) -> None:
        if not (self.markers / marker).exists():
            (self.markers / marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        time.sleep(self.step_s)
        if self.trainer.global_step == 13 and self.trainer.global_rank == 1:
            self._die_once("trained")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._die_once("validated")
        self.log("val_loss", self.trainer.global_step / 100, batch_size=len(batch["id"]))


class Dawdles(UserModule):
    """Slow enough to be watched from outside."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        time.sleep(0.2)
        return super().training_step(batch, batch_idx)
