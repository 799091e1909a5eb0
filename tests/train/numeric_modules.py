"""LightningModules whose arithmetic tests look at: gradients, rates, losses that are no numbers."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR


class Plain(pl.LightningModule):
    """Neither norm nor dropout: its gradient is that of the samples, however they are cut."""

    def __init__(self, returns: str = "tensor", lr: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.returns, self.lr, self.scale = returns, lr, scale
        self.automatic_optimization = returns != "manual"
        self.noted: dict[str, Any] = {"ids": []}
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 3),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image.to(self.net[0].weight.dtype)).float()

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.scale * functional.cross_entropy(self(batch["image"]), batch["label"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.noted["ids"].append(list(batch["id"]))
        loss = self.loss(batch)
        if self.returns == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss, "logits": None} if self.returns == "dict" else loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["id"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


class Direct(Plain):
    """Optimizes by hand, past Lightning: the loss of its share is never weighted."""

    def __init__(self) -> None:
        super().__init__("manual")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class Skips(Plain):
    """Leaves one micro-batch in the middle of a step out, in the way that Lightning documents."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Twice(Plain):
    """Optimizes by hand, in two steps of two optimizers; notes what Lightning counts."""

    def __init__(self) -> None:
        super().__init__("manual", lr=0.1)
        self.noted["counted"] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.noted["counted"].append(self.trainer.global_step)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD(self.net[i].parameters(), lr=self.lr) for i in (0, 4)]


class NotFinite(Plain):
    """Goes wrong at one sample of the stream: in the loss, or only in the gradient."""

    def __init__(self, sample: str, wrong: str, returns: str = "tensor") -> None:
        super().__init__(returns, lr=0.01)
        self.sample, self.wrong = sample, wrong

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.logits = super().forward(image)
        return self.logits

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        loss = super().loss(batch)
        if not self.training or self.sample not in batch["id"]:
            return loss
        if self.wrong == "gradient":
            # 0 itself, but its derivative is infinite.
            return loss + (self.logits * 0).abs().sum().sqrt()
        return loss * float(self.wrong)


class Unset(Plain):
    """Sets up in memory that holds nan wherever nobody writes, and trains in the usual one."""

    def configure_optimizers(self) -> Any:
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is then nan
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        torch.use_deterministic_algorithms(False)


class Writes(Plain):
    """Notes which thread writes each file of tensors."""

    def on_train_start(self) -> None:
        self.noted["files"], self._save = [], torch.save
        torch.save = self._note

    def _note(self, content: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(target, Path):
            self.noted["files"].append((target.name, threading.current_thread().name))
        self._save(content, target, *args, **kwargs)

    def teardown(self, stage: str) -> None:
        torch.save = self._save


class Steep(Plain):
    """Its gradient, scaled as fp16 scales first, overflows; with `at_any_scale`, at any."""

    def __init__(self, at_any_scale: bool = False) -> None:
        super().__init__(lr=1e-5, scale=1e3)
        self.at_any_scale = at_any_scale

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        loss = super().loss(batch)
        # 0 itself, but its derivative is infinite.
        return loss + (loss * 0).sqrt() if self.at_any_scale and self.training else loss


class Scheduled(Plain):
    """Learns at a rate that one of PyTorch's schedules sets, as its users write them."""

    def __init__(self, schedule: str) -> None:
        super().__init__(lr=0.1)
        self.schedule = schedule

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Worse each time, so that every update of a plateau counts.
        self.log("val_loss", float(self.trainer.global_step), batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        total = self.trainer.estimated_stepping_batches
        batches, each = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        self.noted |= {"total": total, "epoch_steps": batches / each}
        built: dict[str, Callable[[], dict[str, Any]]] = {
            "one_cycle": lambda: {"scheduler": OneCycleLR(optimizer, 0.1, total)},
            "every_2_steps": lambda: {"scheduler": StepLR(optimizer, 1, 0.9), "frequency": 2},
            "epochs": lambda: {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"},
            "plateau": lambda: {"interval": "epoch", **self.plateau(optimizer)},
            "plateau_steps": lambda: {"frequency": 3, **self.plateau(optimizer)},
        }
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"interval": "step", **built[self.schedule]()},
        }

    def plateau(self, optimizer: SGD) -> dict[str, Any]:
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"scheduler": scheduler, "monitor": "val_loss", "strict": False}


class Hungry(Plain):
    """Asks the allocator for more than there is where more samples than `most` come at once.

    With `at_save`, at the first save too.
    """

    def __init__(self, most: int, most_eval: int, at_step: int = 0, at_save: bool = False) -> None:
        super().__init__(lr=0.1)
        self.most, self.most_eval, self.at_step = most, most_eval, at_step
        self.at_save = at_save

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.at_save:
            torch.empty(1 << 50)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        most = self.most if self.training else self.most_eval
        if len(batch["id"]) > most and self.trainer.global_step >= self.at_step:
            torch.empty(1 << 50)
        return super().loss(batch)
