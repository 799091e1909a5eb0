"""The module that chaos trains: paced while kills are under way, at full speed once it is calm."""

import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional


class Paced(pl.LightningModule):
    """Batch norm, dropout and AdamW: state and randomness that every restart must bring back.

    Args:
        num_classes: given by the run.
        folder: where it says which step it is at (`steps`), and looks whether it is calm (`calm`).
        pause_s: what a step takes until then.
    """

    def __init__(self, num_classes: int, folder: str, pause_s: float) -> None:
        super().__init__()
        self.folder, self.pause_s = Path(folder), pause_s
        # Saving a state beyond 4 MiB goes on beside the steps, and takes long enough to be hit.
        self.ballast = nn.Parameter(torch.zeros(2**21), requires_grad=False)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32, num_classes),
        )

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return functional.cross_entropy(self.net(batch["image"]).float(), batch["label"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if not (self.folder / "calm").exists():
            time.sleep(self.pause_s)
        if self.trainer.global_rank == 0:
            with (self.folder / "steps").open("a") as file:
                file.write(f"{time.time():.3f} {os.getpid()} {self.trainer.global_step}\n")
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch["id"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)
