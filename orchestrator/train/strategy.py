"""Worker side: DDP or ZeRO as Lightning strategies.

Both strategies weight each micro-batch's loss, so that gradients equal those of one process over
the whole step also where the workers' shares differ by a sample.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from ray.train.lightning import RayDDPStrategy, RayDeepSpeedStrategy
from torch.optim import Optimizer

from orchestrator.config import Strategy
from orchestrator.train.precision import Choice

WEIGHTS_FILE = "weights.pt"
OPTIMIZERS_FILE = "optimizers.pt"
LossWeight = Callable[[], float]


def choose_strategy(requested: Strategy) -> Choice:
    """Return ddp or zero1 to zero3; auto is ddp."""
    if requested != "auto":
        return Choice(requested, "asked for")
    return Choice("ddp", "fastest where each worker holds the whole model")


def read_tensors(path: Path) -> Any:
    """Read a file of tensors and primitives; anything that would run code is refused."""
    return torch.load(path, map_location="cpu", weights_only=True)


class ModelStrategy(Protocol):
    """What checkpointing asks of a strategy."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model's weights; all workers call it, rank 0 gets them."""

    def save_shards(self, folder: Path) -> None:
        """Write this worker's optimizer state (and weights, where sharded) below `folder`."""

    def load_shards(self, folder: Path) -> None:
        """Read back what `save_shards` of the same number of workers wrote."""


def _exact(tensor: Any, reduce_op: Any) -> Any:
    """Return what is to be averaged as floats.

    `self.log(..., sync_dist=True)` averages the workers' sample counts as integers: workers with 5
    and 6 samples gave 5 in place of 5.5, and a val_loss 10 % too high (Lightning 2.6.6).
    """
    if reduce_op in ("mean", "avg") and isinstance(tensor, torch.Tensor):
        return tensor if torch.is_floating_point(tensor) else tensor.double()
    return tensor


class DDPStrategy(RayDDPStrategy):  # type: ignore[misc]
    """Ray's DDP with weighted losses."""

    def __init__(self, loss_weight: LossWeight) -> None:
        super().__init__()
        self._loss_weight = loss_weight

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weight the micro-batch's loss, then backpropagate."""
        weighted = closure_loss * self._loss_weight()
        loss: torch.Tensor = super().backward(weighted, optimizer, *args, **kwargs)
        return loss

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> torch.Tensor:
        """Reduce over the workers; means of whole numbers are exact."""
        reduced: torch.Tensor = super().reduce(_exact(tensor, reduce_op), group, reduce_op)
        return reduced

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the module's state dict: every worker holds it."""
        state: dict[str, torch.Tensor] = self.lightning_module.state_dict()
        return state

    def save_shards(self, folder: Path) -> None:
        """Write the optimizer states once: every worker's are equal."""
        if self.global_rank == 0:
            states = [self.optimizer_state(optimizer) for optimizer in self.optimizers]
            torch.save(states, folder / OPTIMIZERS_FILE)

    def load_shards(self, folder: Path) -> None:
        """Read weights and optimizer states on every worker."""
        self.lightning_module.load_state_dict(read_tensors(folder / WEIGHTS_FILE))
        states = read_tensors(folder / OPTIMIZERS_FILE)
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(saved)


class ZeroStrategy(RayDeepSpeedStrategy):  # type: ignore[misc]
    """DeepSpeed ZeRO 1, 2 or 3; on GPUs with NCCL, on CPUs with gloo.

    Lightning admits DeepSpeed on CUDA only, though DeepSpeed itself runs on CPUs:
    `setup_environment` leaves that guard out, and `root_device` has the index the engine compares.
    """

    def __init__(self, stage: int, loss_weight: LossWeight, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        super().__init__(
            stage=stage, process_group_backend="gloo" if self._on_cpu else None, logging_level=40
        )
        self.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        self._loss_weight = loss_weight

    def setup_environment(self) -> None:
        """Set up the accelerator and the process group, on CPUs too."""
        if not self._on_cpu:
            super().setup_environment()
            return
        self.accelerator.setup_device(self.root_device)
        # What DeepSpeedStrategy.setup_distributed does after comparing CUDA device indices.
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """This worker's device; CPUs need an index, because the engine compares it."""
        return torch.device("cpu", 0) if self._on_cpu else super().root_device

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weight the micro-batch's loss, then let the engine backpropagate.

        Lightning and the engine both divide by the accumulation; one of them is taken back.
        """
        accumulation = self.deepspeed_engine.gradient_accumulation_steps()
        weighted = closure_loss * (self._loss_weight() * accumulation)
        loss: torch.Tensor = super().backward(weighted, optimizer, *args, **kwargs)
        return loss

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> torch.Tensor:
        """Reduce over the workers; means of whole numbers are exact."""
        reduced: torch.Tensor = super().reduce(_exact(tensor, reduce_op), group, reduce_op)
        return reduced

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model's weights, gathered from the workers under ZeRO 3."""
        if self.zero_stage_3:
            gathered = self.deepspeed_engine._zero3_consolidated_16bit_state_dict()
            return gathered or {}
        state: dict[str, torch.Tensor] = self.lightning_module.state_dict()
        return state

    def save_shards(self, folder: Path) -> None:
        """Let the engine write every worker's share."""
        self.deepspeed_engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load_shards(self, folder: Path) -> None:
        """Let the engine read every worker's share.

        DeepSpeed 0.19 unpickles its own files without restriction: a run folder that others can
        write to can run code here.

        Raises:
            RuntimeError: the engine found nothing to read.
        """
        path, _ = self.deepspeed_engine.load_checkpoint(
            str(folder), tag="zero", load_lr_scheduler_states=False
        )
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint below {folder}.")


def build_strategy(
    choice: Choice, loss_weight: LossWeight, device: torch.device
) -> DDPStrategy | ZeroStrategy:
    """Return the Lightning strategy of a choice, for workers on devices of this kind."""
    if choice.value == "ddp":
        return DDPStrategy(loss_weight)
    return ZeroStrategy(int(choice.value[-1]), loss_weight, device)


def sync_buffers(module: pl.LightningModule) -> None:
    """Give every worker rank 0's buffers, so that the model validated is the model saved.

    DDP does so only before a training forward pass; running statistics differ after it.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
