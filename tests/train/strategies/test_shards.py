"""Shards of ZeRO's state, cut anew for other numbers of workers; DeepSpeed is left out."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from orchestrator.config import UserError
from orchestrator.train.strategies import shards
from orchestrator.train.strategies.shards import Group, Segment

# Two parameters as ZeRO 3 cuts them: each into equal parts, the last ones padded.
NUMELS = (7, 4)


def make_group(rank: int, world_size: int, *, filled: bool) -> Group:
    segments = tuple(Segment(numel, -(-numel // world_size)) for numel in NUMELS)
    master = torch.zeros(sum(segment.part for segment in segments))
    group = Group(master, {}, {"lr": 0.5, "weight_decay": 0.1}, segments)
    if filled:
        master[:] = share(segments, rank)
        group.state.update(step=torch.tensor(3.0), exp_avg=-master)
    return group


def share(segments: tuple[Segment, ...], rank: int) -> torch.Tensor:
    """Return a worker's flat share of parameters whose elements count 1, 2, 3, ..."""
    parts, first = [], 1
    for segment in segments:
        at = torch.arange(rank * segment.part, (rank + 1) * segment.part)
        parts.append(torch.where(at < segment.numel, at + first, 0))
        first += segment.numel
    return torch.cat(parts).float()


@pytest.fixture
def alone() -> Iterator[None]:
    """Be the only worker of a process group."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def write(folder: Path, world_size: int) -> None:
    for rank in range(world_size):
        group = make_group(rank, world_size, filled=True)
        shard = shards.pack_shard([group], rank=rank, world_size=world_size)
        torch.save({**shard, "scaler": {"cur_scale": 8.0}}, folder / shards.shard_name(rank))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_one_worker_reads_what_several_wrote(tmp_path: Path, world_size: int) -> None:
    write(tmp_path, world_size)
    group = make_group(0, 1, filled=False)
    options, scaler = shards.load_shards([group], tmp_path, rank=0)
    assert group.master.tolist() == [float(i) for i in range(1, 12)]
    assert group.state["exp_avg"].tolist() == [-float(i) for i in range(1, 12)]
    assert float(group.state["step"]) == 3
    assert options == [{"lr": 0.5, "weight_decay": 0.1}]
    assert scaler == {"cur_scale": 8.0}


@pytest.mark.usefixtures("alone")
def test_another_models_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    other = Group(torch.zeros(5), {}, {}, (Segment(5, 5),))
    with pytest.raises(UserError, match="of other sizes"):
        shards.load_shards([other], tmp_path, rank=0)


@pytest.mark.usefixtures("alone")
def test_states_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / shards.shard_name(1)
    shard = torch.load(path)
    shard["groups"][0]["state"]["rows"] = torch.zeros(2, 2)
    torch.save(shard, path)
    with pytest.raises(UserError, match="'rows' is not one number for each weight"):
        shards.load_shards([make_group(0, 1, filled=False)], tmp_path, rank=0)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no ZeRO shards"):
        shards.load_shards([], tmp_path, rank=0)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("option", ["fused", "capturable", ""])
def test_the_count_of_steps_lies_where_the_optimizer_wants_it(tmp_path: Path, option: str) -> None:
    write(tmp_path, 1)
    group = make_group(0, 1, filled=False)
    # No tensor there has values: whether one was moved is all that shows.
    on_device = dataclasses.replace(
        group, master=group.master.to("meta"), options={**group.options, option: True}
    )
    shards.load_shards([on_device], tmp_path, rank=0)
    assert on_device.state["step"].device.type == ("meta" if option else "cpu")
