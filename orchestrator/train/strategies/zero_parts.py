"""Worker side: what DeepSpeed's engine leaves undone, or does too much of."""

from typing import Any

import pytorch_lightning as pl
from torch import nn


def match_statistics(module: pl.LightningModule) -> None:
    """Keep running statistics in the precision of their layer's weights.

    DeepSpeed 0.19 casts weights only, and PyTorch's batch norm refuses bf16 weights with fp32
    statistics on CPUs ("expected scalar type BFloat16 but found Float").
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            for buffer in (layer.running_mean, layer.running_var):
                if buffer is not None:
                    buffer.data = buffer.data.to(layer.weight.dtype)


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling its all-reduce over shared memory, which training never calls.

    It takes a C++ compiler and a minute at the first start, and a worker killed meanwhile leaves a
    lock behind that the next one waits for.
    """
    import deepspeed

    # Found out at the first look otherwise, by trying every one of its ops.
    vars(deepspeed.ops)["__compatible_ops__"] = {}


def clear_padding(zero: Any, rank: int) -> None:
    """Set to 0 what ZeRO 3 pads the last parts of its parameters with.

    DeepSpeed 0.19 leaves there what the memory held before. No gradient reaches it, but it stands
    among the master weights: their norm may be infinite or nan, for the guard as for an optimizer
    that looks at norms (LAMB).
    """
    for parameters, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        at = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            real = min(max(parameter.ds_numel - rank * part, 0), part)
            for padded in (parameter.ds_tensor.data, master.detach()[at : at + part]):
                padded[real:].zero_()
            at += part


def load_whole(module: pl.LightningModule, weights: dict[str, Any]) -> None:
    """Load under ZeRO 3 what no shard holds: buffers and frozen parameters."""
    import deepspeed

    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0):
        for name, tensor in [*frozen.items(), *module.named_buffers()]:
            if name in weights and tensor.shape == weights[name].shape:
                tensor.data.copy_(weights[name])


def spread_partitions(zero: Any) -> None:
    """Let ZeRO 3's parameters follow its master weights, as DeepSpeed does after loading them."""
    zero.checkpoint_event_prologue()
    for low, high, parts in zip(
        zero.fp16_partitioned_groups_flat,
        zero.fp32_partitioned_groups_flat,
        zero.fp16_partitioned_groups,
        strict=True,
    ):
        low.data.copy_(high.data)
        for part, values in zip(parts, zero.unflatten(low, parts), strict=True):
            part.data = values.data
    zero.checkpoint_event_epilogue()
