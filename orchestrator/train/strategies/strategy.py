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

from orchestrator.train.strategies import memory, shards, zero_parts
from orchestrator.train.strategies.precision import Choice
from orchestrator.train.strategies.tensors import OPTIMIZERS_FILE, read_tensors
from orchestrator.train.strategies.tensors import WEIGHTS_FILE as WEIGHTS_FILE
from orchestrator.train.timing.timed import Timed

LossWeight = Callable[[], float]


class ModelStrategy(Protocol):
    """What checkpointing asks of a strategy."""

    def trained(self) -> list[torch.Tensor]:
        """Return by reference the weights that this worker's optimizer changes."""

    @property
    def has_skipped(self) -> bool:
        """Whether the last step changed nothing because its gradient was not finite."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model's weights; all workers call it, rank 0 gets them."""

    def optimizer_states(self) -> list[Any] | None:
        """Return the optimizers' states by reference; None: they are among the shards."""

    def shards(self) -> dict[str, Any]:
        """Return by reference what differs from worker to worker: file name -> content."""

    def load_shards(self, folder: Path, weights: dict[str, Any]) -> None:
        """Load weights and optimizer states that any number of workers saved."""


def _exact(tensor: Any, reduce_op: Any) -> Any:
    """Return what is to be averaged as floats.

    `self.log(..., sync_dist=True)` averages the workers' sample counts as integers: workers with 5
    and 6 samples gave 5 in place of 5.5, and a val_loss 10 % too high (Lightning 2.6.6).
    """
    if reduce_op in ("mean", "avg") and isinstance(tensor, torch.Tensor):
        return tensor if torch.is_floating_point(tensor) else tensor.double()
    return tensor


class _Weighted(Timed):
    """What both strategies change in Lightning's: weighted losses, exact means, a given device."""

    _loss_weight: LossWeight
    _device: torch.device

    @property
    def root_device(self) -> torch.device:
        """This worker's device."""
        return self._device

    @property
    def _divided_twice(self) -> int:
        """What Lightning and the strategy both divide a loss by."""
        return 1

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weight the micro-batch's loss, then backpropagate."""
        weighted = closure_loss * (self._loss_weight() * self._divided_twice)
        loss: torch.Tensor = super().backward(  # type: ignore[misc]
            weighted, optimizer, *args, **kwargs
        )
        return loss

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> torch.Tensor:
        """Reduce over the workers; means of whole numbers are exact."""
        exact = _exact(tensor, reduce_op)
        reduced: torch.Tensor = super().reduce(exact, group, reduce_op)  # type: ignore[misc]
        return reduced


class DDPStrategy(_Weighted, RayDDPStrategy):  # type: ignore[misc]
    """Ray's DDP with weighted losses."""

    def __init__(self, loss_weight: LossWeight, device: torch.device) -> None:
        # Gradients are views of what is sent, not a second copy of it: 4 bytes a parameter less.
        super().__init__(gradient_as_bucket_view=True)
        self._loss_weight, self._device = loss_weight, device

    def trained(self) -> list[torch.Tensor]:
        """Return all trained weights."""
        return [p.detach() for p in self.lightning_module.parameters() if p.requires_grad]

    @property
    def has_skipped(self) -> bool:
        """False: PyTorch's optimizers step, and its loss scaling tells nobody."""
        return False

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the module's state dict: every worker holds it."""
        state: dict[str, torch.Tensor] = self.lightning_module.state_dict()
        return state

    def optimizer_states(self) -> list[Any] | None:
        """Return the optimizers' states: every worker's are equal."""
        return [self.optimizer_state(optimizer) for optimizer in self.optimizers]

    def shards(self) -> dict[str, Any]:
        """Return nothing: every worker holds all."""
        return {}

    def load_shards(self, folder: Path, weights: dict[str, Any]) -> None:
        """Load weights and optimizer states on every worker."""
        self.lightning_module.load_state_dict(weights)
        states = read_tensors(folder / OPTIMIZERS_FILE)
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(saved)


class ZeroStrategy(_Weighted, RayDeepSpeedStrategy):  # type: ignore[misc]
    """DeepSpeed ZeRO 1, 2 or 3; on GPUs with NCCL, on CPUs with gloo.

    Lightning admits DeepSpeed on CUDA only, though DeepSpeed itself runs on CPUs:
    `setup_environment` leaves that guard out, and the device has the index the engine compares.
    """

    def __init__(
        self, stage: int, loss_weight: LossWeight, device: torch.device, *, offload: bool = False
    ) -> None:
        self._on_cpu = device.type == "cpu"
        self._device = torch.device("cpu", 0) if self._on_cpu else device
        self._loss_weight = loss_weight
        super().__init__(
            stage=stage,
            process_group_backend="gloo" if self._on_cpu else None,
            logging_level=40,
            offload_optimizer=offload,
            pin_memory=offload and not self._on_cpu,
        )
        self.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        # The user's optimizer is the one that steps, also on the CPU.
        self.config["zero_force_ds_cpu_optimizer"] = False

    def setup_environment(self) -> None:
        """Set up the accelerator and the process group, on CPUs too."""
        if not self._on_cpu:
            super().setup_environment()
            return
        zero_parts.leave_out_shared_memory()
        self.accelerator.setup_device(self.root_device)
        # What DeepSpeedStrategy.setup_distributed does after comparing CUDA device indices.
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_config(self) -> None:
        super()._format_config()
        # DeepSpeed's own buffers are made for billions of parameters: 2 of 800 MB each (0.19.8).
        numels = [p.numel() for p in self.lightning_module.parameters() if p.requires_grad]
        self.config["zero_optimization"].update(memory.buffer_settings(numels))

    def init_deepspeed(self) -> None:
        """Wrap the module in DeepSpeed's engine."""
        super().init_deepspeed()
        # Under fp16 it raises a bare Exception where the smallest scale is still too large; the
        # guard counts skipped steps under every strategy, and says what to do.
        vars(self._zero.loss_scaler)["raise_error_at_min_scale"] = False
        zero_parts.match_statistics(self.lightning_module)
        if self.zero_stage_3:
            zero_parts.clear_padding(self._zero, self.global_rank)

    @property
    def _divided_twice(self) -> int:
        accumulation: int = self.deepspeed_engine.gradient_accumulation_steps()
        return accumulation

    @property
    def _zero(self) -> Any:
        return self.deepspeed_engine.optimizer

    def trained(self) -> list[torch.Tensor]:
        """Return this worker's part of the fp32 master weights."""
        zero = self._zero
        third: list[torch.Tensor] | None = getattr(zero, "fp32_partitioned_groups_flat", None)
        return [part.detach() for part in third or zero.single_partition_of_fp32_groups]

    @property
    def has_skipped(self) -> bool:
        """Whether the last step changed nothing: DeepSpeed 0.19 skips so in every precision."""
        return bool(self._zero.overflow)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model's weights, gathered from the workers under ZeRO 3."""
        if self.zero_stage_3:
            gathered = self.deepspeed_engine._zero3_consolidated_16bit_state_dict()
            return gathered or {}
        state: dict[str, torch.Tensor] = self.lightning_module.state_dict()
        return state

    def optimizer_states(self) -> list[Any] | None:
        """Return None: every worker has its own."""
        return None

    def shards(self) -> dict[str, Any]:
        """Return this worker's master weights and optimizer states."""
        groups, rank = shards.groups_of(self._zero), self.global_rank
        shard = shards.pack_shard(groups, rank=rank, world_size=self.world_size)
        scaler = {
            k: v for k, v in vars(self._zero.loss_scaler).items() if isinstance(v, float | int)
        }
        return {shards.shard_name(rank): {**shard, "scaler": scaler}}

    def load_shards(self, folder: Path, weights: dict[str, Any]) -> None:
        """Load what any number of workers saved.

        Raises:
            UserError: the shards are missing or of another model.
        """
        zero = self._zero
        groups = shards.groups_of(zero)
        options, scaler = shards.load_shards(groups, folder, rank=self.global_rank)
        for group, saved in zip(zero.optimizer.param_groups, options, strict=True):
            group.update(saved)
        vars(zero.loss_scaler).update(scaler)
        if self.zero_stage_3:
            zero_parts.load_whole(self.lightning_module, weights)
            zero_parts.spread_partitions(zero)
        else:
            self.lightning_module.load_state_dict(weights)
            zero.update_lp_params()


def build_strategy(
    choice: Choice, loss_weight: LossWeight, device: torch.device, *, offload: bool = False
) -> DDPStrategy | ZeroStrategy:
    """Return the Lightning strategy of a choice, for workers on devices of this kind."""
    if choice.value == "ddp":
        return DDPStrategy(loss_weight, device)
    return ZeroStrategy(int(choice.value[-1]), loss_weight, device, offload=offload)


def sync_buffers(module: pl.LightningModule) -> None:
    """Give every worker rank 0's buffers, so that the model validated is the model saved.

    DDP does so only before a training forward pass; running statistics differ after it.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
