"""Nodes that are announced to go: in a validation, one by one, all at once, and back again."""

import dataclasses
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from driven import EPOCHS, TRAIN, Driver, batches_of, make_config, starts_of
from packed import write_packed
from ray_nodes import Nodes, ray_nodes

from orchestrator.run import read_events
from orchestrator.train.launch import RunResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NOTICE_S = 30


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with ray_nodes() as nodes:
        yield nodes


def preemptions_of(run: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == "preempted"]


def assert_in_time(result: RunResult, steps: list[int], *, most_redone: int) -> None:
    """Check that each notice was answered by a commit, and charged to nobody."""
    events = read_events(result.run)
    assert [event for event in events if event["event"] == "failure"] == []
    for event in preemptions_of(result.run):
        assert event["committed"]
        assert event["deadline"] is None or event["time"] < event["deadline"]
    redone = [a - b + 1 for a, b in itertools.pairwise(steps) if b <= a]
    assert sum(redone) <= most_redone


def test_sigterm_in_a_long_validation_commits_the_step_in_front_of_it(
    cluster: Nodes, tmp_path: Path
) -> None:
    write_packed(tmp_path / "data", train=TRAIN, val=11)
    config = make_config(tmp_path, "validating", workers=(1, 2), step_s=0.05)
    # Each worker has six batches, of a second each; nothing is committed before them.
    data = dataclasses.replace(config.data, eval_batch=1)
    train = dataclasses.replace(
        config.train,
        max_epochs=2,
        checkpoint=dataclasses.replace(config.train.checkpoint, every_steps=None),
    )
    model = dataclasses.replace(config.model, class_path="modules.ValidatesSlowly")
    cluster.add()
    _, process = cluster.start_process()
    driver = Driver(dataclasses.replace(config, data=data, train=train, model=model))
    driver.wait((driver.nodes / "validating").exists)
    os.kill(process.pid, signal.SIGTERM)
    driver.wait(lambda: preemptions_of(driver.run))
    (driver.nodes / "fast").touch()
    result = driver.finish()
    starts = starts_of(read_events(result.run))
    assert [(start["workers"], start["step"]) for start in starts] == [(2, 0), (1, 7)]
    (event,) = preemptions_of(result.run)
    assert event["step"] == 7
    assert_in_time(result, driver.steps(), most_redone=0)
    # It is made up for, over all images.
    rows = pq.read_table(f"{result.run}/metrics.parquet").to_pylist()
    assert [row["step"] for row in rows if row["name"] == "val_loss"] == [7, 14]


def test_drains_of_one_of_rank_0_and_of_all_at_once_cost_a_restart_each(
    cluster: Nodes, tmp_path: Path
) -> None:
    # Without validation: readers of the first one that start on rank 0's node just as it is drained
    # end the start, which falls back to the periodic commit.
    write_packed(tmp_path / "data", train=TRAIN, val=0)
    for _ in range(4):
        cluster.add()
    driver = Driver(make_config(tmp_path, "drained", workers=(2, 3), step_s=0.2))
    driver.wait_for_start(1, workers=3)
    cluster.drain(driver.node_of(1), deadline_s=NOTICE_S)
    driver.wait_for_start(2, workers=3)
    cluster.drain(driver.node_of(0), deadline_s=NOTICE_S)
    driver.wait_for_start(3, workers=2)
    with ThreadPoolExecutor() as pool:
        nodes = [driver.node_of(rank) for rank in range(2)]
        list(pool.map(lambda node: cluster.drain(node, deadline_s=NOTICE_S), nodes))
    driver.wait(lambda: len(preemptions_of(driver.run)) >= 3)
    time.sleep(2)
    assert len(starts_of(read_events(driver.run))) == 3, "there is no node for the fewest workers"
    for _ in range(2):
        cluster.add()
    driver.wait_for_start(4, workers=2)
    (driver.nodes / "fast").touch()
    result = driver.finish()
    first, second, *both = preemptions_of(result.run)
    assert (first["ranks"], second["ranks"]) == ([1], [0])
    assert {rank for event in both for rank in event["ranks"]} <= {0, 1}
    assert_in_time(result, driver.steps(), most_redone=2)
    assert result.result["restarts"] == 3
    counts = Counter(sample for batch in batches_of(result.run).values() for sample in batch)
    assert set(counts.values()) == {1}
    assert len(counts) == TRAIN * EPOCHS
