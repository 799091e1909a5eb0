"""Bytes that weights, gradients and optimizer states take on each worker. Pure arithmetic.

Rajbhandari et al., "ZeRO", SC 2020, section 3: with Psi parameters, mixed precision and N workers,
plain data parallelism holds (2 + 2 + K) Psi bytes, ZeRO 1 (2 + 2 + K / N) Psi, ZeRO 2
(2 + (2 + K) / N) Psi, ZeRO 3 ((2 + 2 + K) / N) Psi; K = 12 for Adam: a master copy, momentum and
variance of 4 bytes each. Here:

- DDP keeps weights and gradients in 4 bytes in every precision (autocast), and no master copy:
  (4 + 4 + 8) Psi with Adam, (4 + 4 + 4) Psi with SGD and momentum.
- DeepSpeed keeps weights and gradients in 2 bytes in bf16 and fp16 and in 4 in fp32, and a master
  copy of 4 bytes in every precision, so that K is 12 for Adam in fp32 too.
- ZeRO 3 keeps parameters of up to 100,000 elements whole on every worker.

Activations come on top, and what `work` counts: buffers of fixed size.
"""

import dataclasses
from collections.abc import Sequence

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
# Elements of one message, and of each buffer: 32 MB in fp32, where PyTorch's DDP takes 25 MB
# (Li et al., "PyTorch Distributed", VLDB 2020, section 5.2: larger ones gain nothing).
BUCKET = 8_000_000
# DeepSpeed's default: gathering smaller parameters again and again costs more than it saves.
WHOLE_BELOW = 100_000
_FP32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What of a model takes memory."""

    parameters: int
    """Elements of all parameters."""
    trainable: int
    """Elements of those that are trained."""
    largest: int
    """Elements of the largest parameter."""
    whole: int
    """Elements of parameters that ZeRO 3 keeps whole: those of up to `WHOLE_BELOW`."""
    buffer_bytes: int = 0
    """Running statistics and the like, whole on every worker."""
    states: float = 2.0
    """fp32 numbers that the optimizer keeps for each trained parameter: Adam 2, plain SGD 0."""
    optimizer: str = "Adam"
    """Name of the optimizer's class."""

    @classmethod
    def of(
        cls,
        shapes: Sequence[tuple[int, bool]],
        *,
        buffer_bytes: int = 0,
        states: float = 2.0,
        optimizer: str = "Adam",
    ) -> "ModelSize":
        """Add up (elements, trained) of every parameter."""
        return cls(
            parameters=sum(numel for numel, _ in shapes),
            trainable=sum(numel for numel, trained in shapes if trained),
            largest=max((numel for numel, _ in shapes), default=0),
            whole=sum(numel for numel, _ in shapes if numel <= WHOLE_BELOW),
            buffer_bytes=buffer_bytes,
            states=states,
            optimizer=optimizer,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes on one worker."""

    parameters: float
    """Weights, and buffers such as running statistics."""
    gradients: float
    optimizer: float
    """Master weights, where there are any, and optimizer states."""
    work: float
    """Buffers of messages, and weights gathered for one layer."""
    host: float = 0.0
    """Of the node's memory, where the optimizer is offloaded."""

    @property
    def states(self) -> float:
        """What the formulas of the ZeRO paper count, on the worker's device."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All of it, on the worker's device."""
        return self.states + self.work


def need(
    size: ModelSize, strategy: str, *, precision: str, num_workers: int, offload: bool = False
) -> Need:
    """Return what one worker holds while gradients are accumulated.

    Args:
        size: the model.
        strategy: ddp, zero1, zero2 or zero3.
        precision: 32, bf16 or 16.
        num_workers: workers of the run.
        offload: whether ZeRO keeps the optimizer in the node's memory.
    """
    if strategy == "ddp":
        return Need(
            parameters=_FP32 * size.parameters + size.buffer_bytes,
            gradients=_FP32 * size.trainable,
            optimizer=_FP32 * size.states * size.trainable,
            # What is sent: gradients are views of it, but not while they are accumulated.
            work=_FP32 * size.trainable,
        )
    each = _FP32 if precision == "32" else 2
    return _of_zero(size, int(strategy[-1]), each=each, num_workers=num_workers, offload=offload)


def _of_zero(size: ModelSize, stage: int, *, each: int, num_workers: int, offload: bool) -> Need:
    parameters: float = size.parameters
    gradients = size.trainable / (num_workers if stage >= 2 else 1)
    if stage == 3:
        parameters = size.whole + (size.parameters - size.whole) / num_workers
        # Of a small parameter every worker keeps its part besides the whole.
        parameters += size.whole / num_workers
    optimizer = _FP32 * (1 + size.states) * size.trainable / num_workers
    bucket = min(BUCKET, size.trainable)
    gathered = 2 * max(bucket, size.largest) if stage == 3 else 0
    # At the step a worker's gradients are copied to fp32, where they are not yet.
    copied = 0 if each == _FP32 else _FP32 * size.trainable / num_workers
    work = each * (2 * bucket + gathered) + copied
    if not offload:
        return Need(
            parameters=each * parameters + size.buffer_bytes,
            gradients=each * gradients,
            optimizer=optimizer,
            work=work,
        )
    # DeepSpeed keeps a worker's gradients there in fp32, ZeRO 1 and 2 its new weights, 2 and 3 what
    # is accumulated; 1 and 2 take a gradient there through a buffer on either side.
    kept, through = 2 if stage == 2 else 1, 0 if stage == 3 else each * size.largest
    return Need(
        parameters=each * parameters + size.buffer_bytes,
        # ZeRO 2 and 3 move a worker's part to the node as it is computed; ZeRO 1 does so last.
        gradients=each * gradients if stage == 1 else 0,
        optimizer=0,
        work=work - copied + through,
        host=optimizer + (_FP32 + kept * each) * size.trainable / num_workers + through,
    )


def buffer_settings(numels: Sequence[int]) -> dict[str, int]:
    """Return DeepSpeed's sizes of buffers, in elements, for trained parameters of these sizes."""
    bucket = min(BUCKET, max(1, sum(numels)))
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * max(1, bucket // 2),  # must be even
        # ZeRO 3 lets go of a layer's weights unless they are used again this soon.
        "stage3_max_live_parameters": max(bucket, *numels, 1),
        "stage3_max_reuse_distance": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": WHOLE_BELOW,
    }


def in_words(num_bytes: float) -> str:
    """Return bytes as people read them: 1.23 GB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.2f} GB"
    return f"{num_bytes / 1e6:,.1f} MB"
