"""Bytes that Python's tensors hold in a process, each storage once: for benchmarks and tests."""

import gc
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch

# What ZeRO's engine keeps on the host beside the optimizer's states, where that is offloaded.
_OFFLOADED = (
    "offload_gradient_dict",
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "temp_grad_buffer_for_cpu_offload",
    "accumulated_grads_in_cpu",
    "grad_partitions_flat_buffer",
)


def count(
    trainer: pl.Trainer, module: pl.LightningModule, before: set[int], *, offload: bool
) -> dict[str, int]:
    """Return the bytes of every storage by what it holds, but for those that were there before."""
    zero = getattr(getattr(trainer.strategy, "deepspeed_engine", None), "optimizer", None)
    inner: Any = trainer.optimizers[0] if zero is None else zero.optimizer
    # What the engine holds under other names: parts of ZeRO 3's parameters, averaged gradients.
    parts = [getattr(p, "ds_tensor", None) for p in module.parameters()]
    averaged = [getattr(zero, name, {}) for name in ("averaged_gradients", "all_grad_tensors")]
    flat = getattr(zero, "grad_partitions_flat_buffer", None)
    masters = getattr(zero, "single_partition_of_fp32_groups", None)
    masters = masters or getattr(zero, "fp32_partitioned_groups_flat", [])
    optimizer = [*masters, *(list(state.values()) for state in inner.state.values())]
    host: list[Any] = []
    if offload:
        host = [*optimizer, *(m.grad for m in masters), *(getattr(zero, n, 0) for n in _OFFLOADED)]
    seen = set(before)
    return {
        "parameters": new_bytes([*module.parameters(), *module.buffers(), *parts], seen),
        "host": new_bytes(host, seen),
        "gradients": new_bytes([*(p.grad for p in module.parameters()), averaged, flat], seen),
        "optimizer": new_bytes(optimizer, seen),
        "work": new_bytes(alive(), seen),
    }


def alive() -> list[torch.Tensor]:
    """Return every tensor that Python holds."""
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]


def new_bytes(values: Iterable[Any], seen: set[int]) -> int:
    """Return the bytes of storages that are not among `seen`, and put them there."""
    total = 0
    for value in values:
        if isinstance(value, dict):
            total += new_bytes(value.values(), seen)
        elif isinstance(value, list | tuple):
            total += new_bytes(value, seen)
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total
