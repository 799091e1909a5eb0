"""What the controller's callbacks make of polls and of starts: each failure once. No Ray.

Their cluster is stood for by what they ask of it: which nodes are drained, and the board.
"""

import types
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.worker import WorkerStatus
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from orchestrator.config import TrainConfig
from orchestrator.run import read_events
from orchestrator.train.errors import OutOfMemory
from orchestrator.train.recovery import elastic
from orchestrator.train.recovery.failures import CodeError, FailureCount, Verdict, mark_step
from orchestrator.train.recovery.mistakes import FailurePolicy, GaveUp, describe
from orchestrator.train.recovery.preemptions import NotePreemptions
from orchestrator.train.recovery.starting import StartFailed

DEAD = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
NOTICE: Any = types.SimpleNamespace(preempted_ranks=[1], deadline_ms=None)


class Said(list[str]):
    """Stands for the board's handle."""

    @property
    def say(self) -> Any:
        return types.SimpleNamespace(remote=self.append)


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    nodes: dict[str, int] = {}
    monkeypatch.setattr(elastic, "draining_nodes", lambda: nodes)
    return nodes


@pytest.fixture
def callbacks(tmp_path: Path, draining: dict[str, int]) -> tuple[FailurePolicy, NotePreemptions]:
    """Return both callbacks as they are while workers run on the node `a`."""
    policy = FailurePolicy(str(tmp_path), "token", Said(), TrainConfig(max_failures=3))
    policy._count = FailureCount(max_failures=3, clock=lambda: 1e9)
    policy._nodes, policy._decided = {"a"}, False
    noting = NotePreemptions(str(tmp_path), Said())
    noting._nodes = {"a"}
    return policy, noting


def poll(error: Exception, *, notice: Any = None) -> Any:
    return WorkerGroupPollStatus({0: WorkerStatus(True, error, None, preemption_info=notice)})


def events(folder: Path) -> list[tuple[str, Any]]:
    return [(event["event"], event.get("cause")) for event in read_events(str(folder))]


def test_what_fails_within_a_notices_time_is_one_failure_and_no_preemption(
    tmp_path: Path, callbacks: Any
) -> None:
    policy, noting = callbacks
    for _ in range(3):  # each poll brings the error anew
        policy.after_worker_group_poll_status(poll(CodeError("ValueError: odd", 6), notice=NOTICE))
    error = WorkerGroupError("failed", {0: CodeError("ValueError: odd", 6)})
    noting.after_controller_state_update(PreemptingState(NOTICE, 0.0), RestartingState(error))
    assert events(tmp_path) == [("failure", "code")]


def test_a_worker_that_dies_within_a_notices_time_is_preempted(
    tmp_path: Path, callbacks: Any
) -> None:
    policy, noting = callbacks
    policy.after_worker_group_poll_status(poll(DEAD, notice=NOTICE))
    error = WorkerGroupError("failed", {0: DEAD})
    noting.after_controller_state_update(PreemptingState(NOTICE, 0.0), RestartingState(error))
    assert events(tmp_path) == [("preempted", None)]


def start_fails(callbacks: Any, failed: BaseException) -> None:
    state = ReschedulingState(ControllerError(failed))
    for callback in callbacks:
        callback.after_controller_state_update(SchedulingState(None), state)


def test_workers_that_end_while_they_start_are_charged_by_their_nodes(
    tmp_path: Path, callbacks: Any, draining: dict[str, int]
) -> None:
    failed = StartFailed({1: DEAD}, nodes=frozenset("b"))
    start_fails(callbacks, failed)
    assert events(tmp_path) == [("failure", "process")]
    draining["b"] = 0
    start_fails(callbacks, failed)
    assert events(tmp_path)[1:] == [("preempted", None)]
    draining.clear()
    start_fails(callbacks, StartFailed({0: DEAD, 1: DEAD}, late_s=60))
    assert events(tmp_path)[2:] == [("failure", "hang")]
    start_fails(callbacks, StartFailed({}))
    with pytest.raises(GaveUp, match=r"the 4\. failure within 24 hours.*; see the nodes' logs"):
        start_fails(callbacks, failed)


def test_a_failure_that_waits_for_nodes_is_one_failure(
    tmp_path: Path, callbacks: Any, draining: dict[str, int]
) -> None:
    for number, nodes in enumerate((frozenset("a"), frozenset("b")), 1):
        draining["b"] = 0
        state = ReschedulingState(ControllerError(StartFailed({0: DEAD}, nodes=nodes)))
        previous: Any = SchedulingState(None)
        for _ in range(9):  # Ray Train's loop, while the policy finds no room
            for callback in callbacks:
                callback.after_controller_state_update(previous, state)
            previous = state
        assert len(events(tmp_path)) == number
    assert events(tmp_path) == [("failure", "process"), ("preempted", None)]


def test_memory_that_runs_out_at_the_same_size_again_is_a_failure(
    tmp_path: Path, callbacks: Any
) -> None:
    policy, _ = callbacks
    for size in (8, 2, 2):
        policy._decided = False  # as when workers have started
        for _ in range(2):  # each poll brings the error anew
            error = OutOfMemory("data.eval_batch", size, 3, "no room")
            mark_step(error, 3)
            policy.after_worker_group_poll_status(poll(error))
    assert events(tmp_path) == [("failure", "code")]


def test_running_workers_are_nobodys_start(tmp_path: Path, callbacks: Any) -> None:
    error = WorkerGroupError("failed", {0: DEAD})
    for callback in callbacks:
        callback.after_controller_state_update(RunningState(), RestartingState(error))
    assert events(tmp_path) == []


def test_a_failure_is_numbered_where_it_counts() -> None:
    counted, reader = Verdict(2, ""), Verdict(2, "", counted=False)
    assert describe("gone", 3, counted, 8).startswith("failure 2 (of at most 8 in 24 h) at step 3:")
    assert describe("gone", 3, reader, 8).startswith("failure at step 3: gone; starting again")
    assert describe("gone", None, Verdict(1, "x"), 0) == "failure while starting: gone; giving up"
