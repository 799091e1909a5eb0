"""A user's module of which one thing takes longer: what holds its run back is known."""

import threading
import time
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from deepspeed.comm import comm
from torch import nn
from torch.nn import functional

DELAY_S = 0.02
# What `slow` names -> what of DeepSpeed's collectives it is.
COLLECTIVES = {
    "collectives": ("all_reduce",),
    "gather": ("all_gather", "all_gather_into_tensor"),
    "scatter": ("reduce_scatter", "reduce_scatter_tensor"),
}


class Slow(pl.LightningModule):
    """Small and quick, but for what `slow` names: it takes `DELAY_S` or more longer."""

    def __init__(self, slow: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 3))
        self.slow = slow

    def setup(self, stage: str) -> None:
        self._quick = _slow_down_deepspeed(COLLECTIVES.get(self.slow, ()))

    def teardown(self, stage: str) -> None:
        for name, call in self._quick.items():
            setattr(comm.cdb, name, call)

    def on_train_start(self) -> None:
        if self.slow == "exchange":
            self.trainer.strategy.model.register_comm_hook(None, _late)

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        logits = self.net(batch["image"].to(next(self.parameters()).dtype))
        return functional.cross_entropy(logits.float(), batch["label"])

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        if self.slow == "model" or (self.slow == "worker" and self.trainer.global_rank == 1):
            time.sleep(2 * DELAY_S)
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        if self.slow == "validation":
            time.sleep(25 * DELAY_S)
        self.log("val_loss", self._loss(batch), batch_size=len(batch["id"]), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.slow == "checkpoint":
            time.sleep(DELAY_S)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = SlowSGD if self.slow == "optimizer" else torch.optim.SGD
        return kind(self.parameters(), lr=0.01)


class SlowSGD(torch.optim.SGD):
    """Plain SGD whose steps take `DELAY_S` longer."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        time.sleep(DELAY_S)
        return loss


def _late(
    state: object, bucket: torch.distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Exchange as DDP does, and answer later, as a slow network would."""
    tensor = bucket.buffer().div_(torch.distributed.get_world_size())
    work = torch.distributed.all_reduce(tensor, async_op=True)

    late: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def wait() -> None:
        work.wait()
        time.sleep(DELAY_S)
        late.set_result(tensor)

    # Not `then`: where the exchange is over by now, that would hold up the backward pass itself.
    threading.Thread(target=wait).start()
    return late


def _slow_down_deepspeed(names: Iterable[str]) -> dict[str, Any]:
    """Let collectives begin later; return them as they were."""
    quick = {name: getattr(comm.cdb, name) for name in names}
    for name, call in quick.items():
        setattr(comm.cdb, name, _later(call))
    return quick


def _later(call: Any) -> Any:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(DELAY_S)
        return call(*args, **kwargs)

    return slow
