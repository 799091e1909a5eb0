"""LightningModules as users write them, named by `class_path` in tests."""

import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional


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


class NeverImproves(UserModule):
    """Its validation loss only grows."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch), batch_size=len(batch["id"]), sync_dist=True)
