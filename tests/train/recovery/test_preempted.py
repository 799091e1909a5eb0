"""One elastic run on real nodes that are killed, added, drained and ended by SIGTERM."""

import contextlib
import dataclasses
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare import open_loader
from driven import BATCH, EPOCHS, EVERY, TRAIN, Driver, batches_of, make_config, starts_of
from packed import write_packed
from ray_nodes import Nodes, ray_nodes

from orchestrator.data.feeds import training_feed
from orchestrator.data.index import Index
from orchestrator.run import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Story:
    """What was done to a run, and what came of it."""

    events: list[dict[str, Any]]
    result: dict[str, Any]
    run: str
    steps: list[int]
    """That worker 0 has begun, one after the other."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ray_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def index(root: Path) -> Index:
    # Without validation, see test_drains.py.
    return write_packed(root / "data", train=TRAIN, val=0)


@pytest.fixture(scope="module")
def story(cluster: Nodes, root: Path, index: Index) -> Story:
    """Three workers; one node is killed, one comes, one is drained, one ends by SIGTERM."""
    for _ in range(3):
        cluster.add()
    driver = Driver(make_config(root, "disturbed", workers=(1, 3), step_s=0.2))
    driver.wait_for_start(1, workers=3)
    driver.wait_for_commit()
    cluster.kill(driver.node_of(2))
    driver.wait_for_start(2, workers=2)
    new, process = cluster.start_process()
    driver.wait_for_start(3, workers=3)
    driver.wait(lambda: new in {driver.node_of(rank) for rank in range(3)})
    first = driver.node_of(0)
    if first == new:
        first = driver.node_of(1)  # the other way round: drain rank 1's, end rank 0's
    cluster.drain(first, deadline_s=20)
    # The next workers have their places, one of them on the node that goes now.
    driver.wait(lambda: len(starts_of(read_events(driver.run))) >= 4)
    os.kill(process.pid, signal.SIGTERM)
    driver.wait_for_start(5, workers=1)
    (driver.nodes / "fast").touch()
    result = driver.finish()
    return Story(read_events(result.run), result.result, result.run, driver.steps())


def test_the_number_of_workers_follows_the_nodes(story: Story) -> None:
    assert [start["workers"] for start in starts_of(story.events)] == [3, 2, 3, 2, 1]
    resized = [event for event in story.events if event["event"] == "resized"]
    told = [(event["from"], event["to"], event["reason"]) for event in resized]
    assert told[:2] == [(3, 2, "workers were lost"), (2, 3, "more nodes are there")]
    # The start on two workers may end before it says so.
    assert told[-1] == (2, 1, "nodes were preempted")


def test_every_image_is_consumed_once_an_epoch_in_the_undisturbed_order(
    story: Story, root: Path, index: Index
) -> None:
    disturbed = batches_of(story.run)
    counts = Counter(sample for samples in disturbed.values() for sample in samples)
    assert set(counts.values()) == {1}
    assert len(counts) == TRAIN * EPOCHS
    config = make_config(root, "undisturbed", workers=1, step_s=0)
    feed = training_feed(config, index, num_workers=1)
    names: dict[int, str] = {}
    with contextlib.closing(open_loader(feed, config, rank=0, step=0)) as loader:
        for _ in loader.take(feed.batching.num_steps):
            assert loader.current is not None
            batch = loader.current.batch
            names.update(zip(batch.positions, batch.ids, strict=True))
    assert disturbed == {
        start // BATCH + 1: sorted((p // TRAIN, names[p]) for p in range(start, start + BATCH))
        for start in range(0, TRAIN * EPOCHS, BATCH)
    }


def test_nodes_drained_shortly_after_each_other_cost_no_step_and_two_restarts(
    story: Story,
) -> None:
    preempted = [event for event in story.events if event["event"] == "preempted"]
    assert len(preempted) == 2
    third, fourth = starts_of(story.events)[3:]
    assert preempted[0]["committed"]
    assert preempted[0]["time"] < preempted[0]["deadline"]
    assert len(preempted[0]["ranks"]) == 1
    assert third["step"] == preempted[0]["step"]
    # The second may come before that start's first step: then there is nothing to commit.
    assert fourth["step"] == (preempted[1]["step"] or third["step"])
    assert story.result["preemptions"] == 2
    assert story.result["restarts"] == 4


def test_only_the_kill_cost_steps_and_no_more_than_those_since_the_last_commit(
    story: Story,
) -> None:
    redone = [a - b + 1 for a, b in itertools.pairwise(story.steps) if b <= a]
    assert len(redone) <= 1
    assert sum(redone) <= EVERY + 1  # and the one under way
    failures = [event for event in story.events if event["event"] == "failure"]
    assert [failure["cause"] for failure in failures] == ["process"]  # with max_failures=1
