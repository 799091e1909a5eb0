"""Worker side: copies of a training state in host memory, so that steps go on while it is written.

The buffers are reused: writing to fresh memory costs the step loop several times the copy itself
(page faults on CPUs, pinning on GPUs). Pure torch: no Ray, no Lightning.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

Key = tuple[Any, ...]


class Snapshots:
    """Host buffers that each snapshot writes over: one snapshot is in use at a time."""

    def __init__(self) -> None:
        self._buffers: dict[Key, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self._from_gpu = False

    def take(self, state: Any) -> Any:
        """Return a copy of nested dicts, lists and tuples whose tensors lie in host memory.

        From a GPU the copies are queued on its current stream into pinned memory and this returns
        at once: what changes the tensors later is queued behind them. (A side stream would let the
        next forward pass overlap them too, but that may write buffers such as running statistics.)
        Call `wait` before reading the copy.
        """
        used: dict[Key, torch.Tensor] = {}
        self._from_gpu, self._copied = False, None
        copied = self._copy(state, (), used)
        self._buffers = used
        if self._from_gpu:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait until the last snapshot's copies from a GPU have arrived; any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()

    @property
    def num_bytes(self) -> int:
        """Size of the last snapshot."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _copy(self, value: Any, key: Key, used: dict[Key, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), key, used)
        if isinstance(value, dict):
            return {k: self._copy(v, (*key, k), used) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(v, (*key, i), used) for i, v in enumerate(value))
        return copy.deepcopy(value)

    def _copy_tensor(
        self, tensor: torch.Tensor, key: Key, used: dict[Key, torch.Tensor]
    ) -> torch.Tensor:
        if tensor.layout is not torch.strided or type(tensor) is not torch.Tensor:
            return tensor.cpu().clone()
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        self._from_gpu |= tensor.is_cuda
        used[key] = buffer
        return buffer


def without_tensors(value: Any) -> Any:
    """Return `value` with each tensor replaced by an empty one: its structure, and little else."""
    return map_tensors(value, lambda tensor: torch.empty(0, dtype=tensor.dtype))


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return nested dicts, lists and tuples with each tensor replaced by `change` of it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(v, change) for v in value)
    return value
