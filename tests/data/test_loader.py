"""The worker's side: order checked, pieces joined, short steps filled with weight 0."""

import itertools
from collections.abc import Generator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from packed import write_packed

from orchestrator.config import Config, DataConfig, TrainConfig
from orchestrator.data import feeds, plan
from orchestrator.data.assemble import Costs, WrongOrderError, assemble
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.loader import Loader, Opened


def make_feed(root: Path, *, num_workers: int, global_batch: int = 7, **packed: object) -> Feed:
    index = write_packed(root, **packed)
    data = DataConfig(index=str(root), global_batch=global_batch, image_size=8, window_chunks=2)
    config = Config(name="run", data=data, train=TrainConfig(max_epochs=2))
    return feeds.training_feed(config, index, num_workers=num_workers)


def split(feed: Feed, step: int, stop: int) -> list[list[pa.Table]]:
    """Deal the blocks of steps [step, stop) in round robin, as Ray Data does."""
    works = feed.works(step=step, stop_step=stop)
    blocks = [table for work in works for table in feed.reader.blocks(work)]
    return [blocks[rank :: feed.batching.num_workers] for rank in range(feed.batching.num_workers)]


def generated(blocks: list[pa.Table]) -> Generator[pa.Table, None, None]:
    yield from blocks


def loader(feed: Feed, rank: int, *, step: int = 0, segment: int = 3) -> Loader:
    def open_segment(first: int) -> Opened:
        stop = min(first + segment, feed.batching.num_steps)
        return Opened(generated(split(feed, first, stop)[rank]), stop, open_next_at=stop - 1)

    to_device = ToDevice(torch.device("cpu"), feed.reader.render.data)
    return Loader(
        feed.batching, rank=rank, step=step, open_segment=open_segment, to_device=to_device,
        image_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_together_consume_every_position_once(tmp_path: Path, num_workers: int) -> None:
    feed = make_feed(tmp_path, num_workers=num_workers)
    positions: list[int] = []
    for rank in range(num_workers):
        mine = loader(feed, rank)
        for _ in mine.take(feed.batching.num_steps):
            positions += mine.current.batch.positions
    assert sorted(positions) == list(range(80))


def test_a_resumed_loader_goes_on_where_another_stopped(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, num_workers=2)
    steps = feed.batching.num_steps
    whole = [batch["id"] for batch in loader(feed, 1).take(steps)]
    resumed = [batch["id"] for batch in loader(feed, 1, step=5).take(steps - 5)]
    assert whole[5:] == resumed


@pytest.mark.parametrize("held", [1, 4, 100])
def test_steps_held_in_memory_are_the_same_and_wait_for_nothing(tmp_path: Path, held: int) -> None:
    feed = make_feed(tmp_path, num_workers=2)
    steps = feed.batching.num_steps
    expected = [batch["id"] for batch in loader(feed, 1).take(steps)]
    mine = loader(feed, 1)
    found, waited_s = [], []
    for batch in mine.take(steps):
        found.append(batch["id"])
        if len(found) == 3:
            mine.hold(held)
        waited_s.append(mine.waited_s)
    assert found == expected
    assert len(set(waited_s[2 : 3 + held])) == 1
    assert mine.prepared_s > 0


def test_the_batch_is_what_a_training_step_is_promised(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, num_workers=1)
    batch = next(iter(loader(feed, 0).take(1)))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (7, 3, 8, 8)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].dtype == torch.int64
    assert len(batch["id"]) == 7
    grey = (
        batch["image"] * torch.tensor(feed.reader.render.data.std).view(1, 3, 1, 1)
    ) + torch.tensor(feed.reader.render.data.mean).view(1, 3, 1, 1)
    assert grey.min() >= -1e-6
    assert grey.max() <= 1 + 1e-6


def test_a_planted_wrong_order_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_BYTES", 1)  # a block for every micro-batch
    feed = make_feed(tmp_path, num_workers=2)
    mine, other = split(feed, 0, feed.batching.num_steps)
    swapped = [mine[1], mine[0], *mine[2:]]
    for blocks in (swapped, mine[1:], [mine[0], *mine[2:]], other):
        with pytest.raises(WrongOrderError, match="was due"):
            list(assemble(iter(blocks), feed.batching, rank=0, micro=0, costs=Costs()))


def test_a_segment_that_ends_early_raises(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, num_workers=2)

    def open_segment(step: int) -> Opened:
        # Ray Data drops the last (rows mod workers) rows of an execution that is not planned.
        return Opened(generated(split(feed, step, step + 3)[0][:-1]), step + 3, step + 3)

    mine = Loader(
        feed.batching,
        rank=0,
        step=0,
        open_segment=open_segment,
        to_device=ToDevice(torch.device("cpu"), feed.reader.render.data),
        image_size=8,
    )
    with pytest.raises(WrongOrderError, match="ran out of blocks before micro-batch"):
        list(mine.take(feed.batching.num_steps))


def test_a_stream_that_ends_early_raises(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, num_workers=1)
    short = Loader(
        feed.batching,
        rank=0,
        step=0,
        open_segment=lambda step: Opened(generated(split(feed, step, step + 1)[0][:0]), 12, 12),
        to_device=ToDevice(torch.device("cpu"), feed.reader.render.data),
        image_size=8,
    )
    with pytest.raises(WrongOrderError, match="ran out of blocks"):
        next(iter(short.take(1)))


def test_an_empty_share_gets_a_stand_in_that_counts_for_nothing(tmp_path: Path) -> None:
    # 10 samples in steps of 9 on 4 workers: the last step of the run has 2 samples.
    feed = make_feed(tmp_path, num_workers=4, global_batch=9, train=10, val=4)
    weights = {}
    for rank in range(4):
        mine = loader(feed, rank)
        for step, batch in enumerate(mine.take(feed.batching.num_steps)):
            weights[step, rank] = mine.current.weight
            assert len(batch["image"]) >= 1
            assert len(batch["label"]) == len(batch["image"]) == len(batch["id"])
    last = [weights[2, rank] for rank in range(4)]
    assert sorted(last) == [0, 0, 2, 2]
    for step in range(3):
        assert sum(weights[step, rank] for rank in range(4)) == pytest.approx(4)


def test_bad_images_leave_the_batch_and_keep_the_gradient_right(tmp_path: Path) -> None:
    feed = make_feed(
        tmp_path, num_workers=1, global_batch=10, train=10, val=4, broken={"train-0003": b"no"}
    )
    mine = loader(feed, 0)
    batch = next(iter(mine.take(1)))
    assert len(batch["id"]) == 9
    assert "train-0003" not in batch["id"]
    assert [entry["id"] for entry in mine.current.batch.bad] == ["train-0003"]
    assert mine.current.weight == pytest.approx(0.9)


def test_iterating_reads_nothing_before_a_batch_is_asked_for(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, num_workers=1)
    mine = loader(feed, 0)
    for _ in itertools.repeat(None, 3):
        iter(mine.take(2))  # Lightning calls iter() more often than it consumes
    first = next(iter(mine.take(1)))
    assert mine.current.batch.micro == 0
    assert len(first["id"]) == 7


def test_the_next_segment_is_opened_before_the_one_in_hand_ends(tmp_path: Path) -> None:
    feed = make_feed(tmp_path, num_workers=1)
    opened: list[tuple[int, int | None]] = []
    mine: Loader

    def open_segment(step: int) -> Opened:
        opened.append((step, mine.current.batch.micro if mine.current else None))
        stop = min(step + 5, feed.batching.num_steps)
        return Opened(generated(split(feed, step, stop)[0]), stop, open_next_at=stop - 2)

    mine = Loader(
        feed.batching,
        rank=0,
        step=0,
        open_segment=open_segment,
        to_device=ToDevice(torch.device("cpu"), feed.reader.render.data),
        image_size=8,
    )
    ids = [batch["id"] for batch in mine.take(feed.batching.num_steps)]
    assert sum(map(len, ids)) == 80
    # Steps 0 to 11; each segment but the first is opened when step stop - 2 is asked for.
    assert opened == [(0, None), (5, 2), (10, 7)]


@pytest.mark.parametrize("positions", [[0, 1, 3, 4, 5, 6], [0, 1, 1, 3, 4, 5, 6]])
def test_a_block_that_lacks_or_doubles_a_position_raises(
    tmp_path: Path, positions: list[int]
) -> None:
    feed = make_feed(tmp_path, num_workers=1)
    block = split(feed, 0, 1)[0][0]
    assert block["positions"][0].as_py() == list(range(7))
    at = block.schema.get_field_index("positions")
    spoilt = block.set_column(at, block.schema.field(at), pa.array([positions]))
    with pytest.raises(WrongOrderError, match="missing or doubled"):
        list(assemble(iter([spoilt]), feed.batching, rank=0, micro=0, costs=Costs()))
