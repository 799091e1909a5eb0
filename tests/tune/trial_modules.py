"""A LightningModule whose validation loss follows a script: what a sweep does with it is known."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional


class Scripted(pl.LightningModule):
    """Logs `curve[epoch]` (None: NaN) as its loss after `seconds`; raises without file `needs`."""

    def __init__(
        self, num_classes: int, curve: list[float | None], seconds: float = 0.2, needs: str = ""
    ) -> None:
        super().__init__()
        self.curve, self.seconds, self.needs = curve, seconds, needs
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.needs and not Path(self.needs).exists():
            raise ArithmeticError("the loss went to pieces\nand more")
        return functional.cross_entropy(self.net(batch["image"].float()), batch["label"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 0:
            time.sleep(self.seconds)
        value = self.curve[min(self.current_epoch, len(self.curve) - 1)]
        loss = float("nan") if value is None else value
        self.log("val_loss", loss, batch_size=len(batch["id"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)
