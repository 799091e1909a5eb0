"""Worker side: ZeRO's sharded optimizer state as plain tensors, cut anew for any number of workers.

DeepSpeed's own checkpoints are unpickled without restriction and load on as many workers as wrote
them. Its universal checkpoint (0.19.8) loads elsewhere, but knows Adam's states only (`KeyError:
'exp_avg'` for SGD), gives every parameter group the options of the first under ZeRO 3 (weight decay
on biases), and leaves out buffers. So the shards are read and written here.

Every worker holds flat fp32 tensors, one a parameter group. ZeRO 1 and 2 lay a group's parameters
end to end and cut the whole into equal parts; ZeRO 3 cuts each parameter into equal parts and lays
a worker's parts end to end. Both are lists of *segments*, each cut into equal parts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import UserError
from orchestrator.train.strategies.tensors import read_tensors

Shard = dict[str, Any]
"""What one worker writes: tensors and primitives."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Elements that are cut into equal parts, one a worker; the last parts may be padding."""

    numel: int
    """Elements without padding."""
    part: int
    """Elements of each worker's part, with padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One worker's share of one parameter group, by reference."""

    master: torch.Tensor
    """Its fp32 weights, flat."""
    state: dict[str, Any]
    """The optimizer's state of `master`."""
    options: dict[str, Any]
    """The parameter group, but for its parameters."""
    segments: tuple[Segment, ...]


def groups_of(optimizer: Any) -> list[Group]:
    """Return this worker's share of a DeepSpeed ZeRO optimizer, by reference.

    Raises:
        UserError: DeepSpeed split a group, as it does where states are swapped to disk.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        masters, parameters = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        cut = [tuple(Segment(p.ds_numel, p.partition_numel()) for p in ps) for ps in parameters]
    else:
        masters, parameters = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        numels = [sum(p.numel() for p in ps) for ps in parameters]
        cut = [(Segment(n, m.numel()),) for n, m in zip(numels, masters, strict=True)]
    inner = optimizer.optimizer
    if len(masters) != len(inner.param_groups):
        raise UserError(
            f"DeepSpeed cut {len(inner.param_groups)} parameter groups into {len(masters)} parts, "
            "which cannot be saved; train with --train.strategy zero2."
        )
    options = [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
    return [
        Group(master, inner.state[master], option, segments)
        for master, option, segments in zip(masters, options, cut, strict=True)
    ]


def shard_name(rank: int) -> str:
    """Return the file name of a worker's shard."""
    return f"zero-rank-{rank:05d}.pt"


def pack_shard(groups: Sequence[Group], *, rank: int, world_size: int) -> Shard:
    """Return what a worker's shard file holds; tensors by reference."""
    return {
        "rank": rank,
        "world_size": world_size,
        "groups": [
            {
                "master": group.master.detach(),
                "state": dict(group.state),
                "options": group.options,
                "segments": [dataclasses.astuple(segment) for segment in group.segments],
            }
            for group in groups
        ],
    }


def load_shards(
    groups: Sequence[Group], folder: Path, *, rank: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Fill this worker's share from the shards of any number of workers, one file at a time.

    Returns:
        the options of each parameter group and the state of the loss scaler, as saved.

    Raises:
        UserError: the shards are of another model, or hold states that cannot be cut.
    """
    options: list[dict[str, Any]] = []
    scaler: dict[str, Any] = {}
    for shard in _shards(folder, rank):
        if [[s.numel for s in group.segments] for group in groups] != _numels(shard):
            raise UserError(
                f"the checkpoint's shards are of a model or parameter groups of other sizes than "
                f"this one's ({_numels(shard)[0][:3]} ...); resume with the model that wrote it."
            )
        for group, saved in zip(groups, shard["groups"], strict=True):
            _fill(group, saved, rank=rank, source=shard["rank"])
        options, scaler = [saved["options"] for saved in shard["groups"]], shard["scaler"]
    return options, scaler


def _shards(folder: Path, rank: int) -> Iterator[Shard]:
    """Yield every shard; where as many workers wrote them as read them, only this worker's own."""
    paths = sorted(folder.glob("zero-rank-*.pt"))
    if not paths:
        raise UserError(
            "the run's last checkpoint holds no ZeRO shards; resume with the train.strategy that "
            "wrote it, or give the run another --name."
        )
    same = torch.distributed.get_world_size() == len(paths)
    for path in [folder / shard_name(rank)] if same else paths:
        yield read_tensors(path)


def _numels(shard: Shard) -> list[list[int]]:
    return [[numel for numel, _ in group["segments"]] for group in shard["groups"]]


def _fill(group: Group, saved: dict[str, Any], *, rank: int, source: int) -> None:
    parts = [Segment(*segment) for segment in saved["segments"]]
    size = saved["master"].shape
    with torch.no_grad():
        _copy(group, group.master, saved["master"], parts, rank=rank, source=source)
        for name, value in saved["state"].items():
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                # As PyTorch's load_state_dict does with `step`.
                on_device = group.options.get("fused") or group.options.get("capturable")
                group.state[name] = value.to(group.master.device) if on_device else value
            elif not isinstance(value, torch.Tensor):
                group.state[name] = value
            elif value.shape != size:
                raise UserError(
                    f"the optimizer's state {name!r} is not one number for each weight, so that it "
                    "loads on as many workers only as wrote it; change scaling.num_workers back."
                )
            else:
                if getattr(group.state.get(name), "shape", None) != group.master.shape:
                    group.state[name] = torch.zeros_like(group.master, dtype=value.dtype)
                _copy(group, group.state[name], value, parts, rank=rank, source=source)


def _copy(
    group: Group,
    target: torch.Tensor,
    values: torch.Tensor,
    parts: Sequence[Segment],
    *,
    rank: int,
    source: int,
) -> None:
    """Copy what worker `source`'s old share and worker `rank`'s new one have in common."""
    to = at = 0
    for new, old in zip(group.segments, parts, strict=True):
        low = max(rank * new.part, source * old.part)
        high = min((rank + 1) * new.part, (source + 1) * old.part, new.numel)
        if low < high:
            first, begin = to + low - rank * new.part, at + low - source * old.part
            target[first : first + high - low].copy_(values[begin : begin + high - low])
        to, at = to + new.part, at + old.part
