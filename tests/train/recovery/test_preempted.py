"""One elastic run on real nodes that are killed, added, drained and ended by SIGTERM."""

import contextlib
import dataclasses
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bare import open_loader
from packed import write_packed
from ray_nodes import Nodes, ray_nodes, wait_for

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
)
from orchestrator.data.feeds import training_feed
from orchestrator.data.index import Index
from orchestrator.run import read_events
from orchestrator.train.launch import RunResult, fit
from orchestrator.train.saving import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TRAIN, BATCH, EPOCHS, EVERY = 91, 13, 25, 10


def make_config(root: Path, name: str, *, workers: int | tuple[int, int], step_s: float) -> Config:
    nodes = root / f"nodes-{name}"
    nodes.mkdir()
    return Config(
        name=name,
        storage_path=str(root),
        data=DataConfig(
            index=str(root / "data"),
            global_batch=BATCH,
            max_micro_batch=BATCH,
            eval_batch=8,
            image_size=8,
            window_chunks=3,
            audit=True,
        ),
        model=ModelConfig(
            class_path="modules.Slow", init_args={"folder": str(nodes), "step_s": step_s}
        ),
        train=TrainConfig(
            max_epochs=EPOCHS,
            strategy="ddp",
            precision="32",
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=EVERY),
            max_failures=1,
        ),
        scaling=ScalingConfig(num_workers=workers),
    )


@dataclasses.dataclass
class Story:
    """What was done to a run, and what came of it."""

    events: list[dict[str, Any]]
    result: dict[str, Any]
    run: str
    steps: list[int]
    """That worker 0 has begun, one after the other."""


def starts_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "training"]


def batches_of(run: str) -> dict[int, list[tuple[int, str]]]:
    """Return the samples of each committed step; the audit is deleted where a step is undone."""
    rows = pq.read_table(f"{run}/samples").to_pylist()
    steps: dict[int, list[tuple[int, str]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append((row["epoch"], row["id"]))
    return {step: sorted(samples) for step, samples in sorted(steps.items())}


class Driver:
    """Runs `fit` in a thread, while the test takes nodes away."""

    def __init__(self, config: Config) -> None:
        self.run = str(Path(config.storage_path) / config.name)
        self.nodes = Path(config.model.init_args["folder"])
        self._outcome: list[RunResult | BaseException] = []
        self._config = config
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._outcome.append(fit(self._config))
        except BaseException as error:  # shown by the test's thread
            self._outcome.append(error)

    def finish(self) -> RunResult:
        self._thread.join(120)
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def wait(self, look: Callable[[], Any], *, timeout_s: float = 60) -> Any:
        def look_or_fail() -> Any:
            assert not self._outcome, self._outcome
            return look()

        return wait_for(look_or_fail, timeout_s=timeout_s)

    def wait_for_start(self, number: int, *, workers: int) -> None:
        """Wait until start `number` (from 1 on) trains on as many workers."""
        events = self.wait(
            lambda: len(found := starts_of(read_events(self.run))) >= number and found
        )
        start = events[number - 1]
        assert start["workers"] == workers
        self.wait(lambda: (steps := self.steps()) and steps[-1] >= start["step"] + 3)

    def steps(self) -> list[int]:
        """Return the steps that worker 0 has begun, one after the other."""
        path = self.nodes / "steps"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_for_commit(self) -> None:
        """Wait for the first commit."""
        self.wait(lambda: checkpoint.list_manifests(self.run))

    def node_of(self, rank: int) -> str:
        return (self.nodes / f"rank-{rank}").read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ray_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def index(root: Path) -> Index:
    return write_packed(root / "data", train=TRAIN, val=11)


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
    time.sleep(8)  # the next workers have their places, one of them on the node that goes now
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
