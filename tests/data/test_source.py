"""The stream through Ray Data: real executions, dealt to one to four workers in threads."""

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from packed import write_packed
from streaming import SHARING, Workers

from orchestrator.config import Config, DataConfig, TrainConfig
from orchestrator.data import feeds, plan, source
from orchestrator.data.feeds import Feed
from orchestrator.data.index import Index
from orchestrator.data.source import blocks_of, plan_segment, split_segment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
TRAIN = 331  # a prime: no batch size divides it


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_packed(tmp_path_factory.mktemp("data"), train=TRAIN, val=8, shard_rows=50)


def make_feed(index: Index, *, workers: int, epochs: int = 2, **data: Any) -> Feed:
    settings = {"global_batch": 29, "max_micro_batch": 5, "image_size": 8, "window_chunks": 3}
    config = Config(
        data=DataConfig(index=index.uri, **{**settings, **data}),
        train=TrainConfig(max_epochs=epochs),
    )
    return feeds.training_feed(config, index, num_workers=workers)


@pytest.fixture(scope="module")
def order(index: Index) -> list[str]:
    """Return the ids of two epochs as one worker gets them."""
    feed = make_feed(index, workers=1)
    return Workers(feed).consume(feed.batching.num_steps)


# These two leave their iteration early, so they come first: Ray Data's thread lives on a moment,
# and one that asks Ray for a block while Ray shuts down ends the whole process.
def test_what_waits_for_its_workers_stays_in_the_object_store_and_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1,000 images of 224 x 224 are 150 MB of pixels; the worker takes the first and then pauses.
    monkeypatch.setattr(plan, "TASK_ROWS", 64)
    monkeypatch.setattr(source, "_MIN_BUFFER_BYTES", 1)
    monkeypatch.setattr(plan, "BLOCK_BYTES", 8 << 20)
    big = write_packed(tmp_path, train=1000, val=8, shard_rows=200)
    feed = make_feed(big, workers=1, epochs=1, image_size=224, global_batch=50)
    segment = plan_segment(feed, SHARING, 0)
    (iterator,) = split_segment(feed, SHARING, segment)
    blocks = blocks_of(iterator)
    next(blocks)
    held, last = 0, -1
    while held > last:
        last = held
        time.sleep(2)
        held, _ = store_stats()
    blocks.close()
    assert 8e6 < held < 80e6
    assert store_stats()[1] == 0


def test_a_slow_worker_is_waited_for_and_loses_nothing(index: Index, order: list[str]) -> None:
    feed = make_feed(index, workers=2)
    got = Workers(feed).consume(12, pause=lambda rank: 0.05 * rank)
    assert got == order[: 12 * 29]


def test_each_epoch_holds_every_image_once(order: list[str]) -> None:
    expected = sorted(f"train-{i:04d}" for i in range(TRAIN))
    assert sorted(order[:TRAIN]) == sorted(order[TRAIN:]) == expected
    assert order[:TRAIN] != order[TRAIN:]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_order_is_the_same_at_every_world_size(
    index: Index, order: list[str], workers: int
) -> None:
    feed = make_feed(index, workers=workers)
    assert Workers(feed).consume(feed.batching.num_steps) == order


def test_the_world_size_changes_in_the_middle_of_an_epoch_and_a_window(
    index: Index, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of one micro-batch and tasks of one window: many pieces and many edges.
    monkeypatch.setattr(plan, "BLOCK_BYTES", 1)
    monkeypatch.setattr(plan, "TASK_ROWS", 1)
    got: list[str] = []
    for step, stop, workers in ((0, 4, 2), (4, 15, 3), (15, 23, 1)):
        feed = make_feed(index, workers=workers)
        window = feed.source.order.window_at(step * 29)
        assert step == 0 or window.start < step * 29 < window.stop
        got += Workers(feed, step=step).consume(stop - step)
    assert got == order


def test_segments_follow_each_other_without_a_gap(
    index: Index, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TASK_ROWS", 24)
    monkeypatch.setattr(source, "_MIN_SEGMENT_TASKS", 9)
    monkeypatch.setattr(source, "_SEGMENT_TASKS_PER_SLOT", 1)
    monkeypatch.setattr(source, "_LEAD_TASKS_PER_SLOT", 1)
    feed = make_feed(index, workers=2)
    workers = Workers(feed)
    assert workers.consume(feed.batching.num_steps) == order
    assert len(workers.opened) == 4  # seven steps of a segment, of 23


def store_stats() -> tuple[int, int]:
    """Return how many bytes the object store of this machine holds, and has written to disk.

    Asked in a Ray worker: Ray's client for it ends its process a minute after the cluster is gone.
    """

    @ray.remote(num_cpus=0)
    def ask() -> tuple[int, int]:
        internal_api = importlib.import_module("ray._private.internal_api")
        state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        stats = internal_api.get_memory_info_reply(state).store_stats
        return stats.object_store_bytes_used, stats.spilled_bytes_total

    used, spilled = ray.get(ask.remote())
    return used, spilled
