"""Ctrl-C, and nodes that are drained before their workers begin: what the controller is asked."""

import os
import pickle
import signal
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.controller.state import InitializingState, RestartingState
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.run import read_events
from orchestrator.train.recovery import interrupt
from orchestrator.train.recovery.interrupt import abort_at_interrupt
from orchestrator.train.recovery.notice import Refused, charge_of
from orchestrator.train.recovery.preemptions import NotePreemptions


def interrupt_myself(running: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    ray.get(running, timeout=60)
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("answers", [True, False])
def test_ctrl_c_ends_a_run_whether_its_controller_answers_or_not(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    # Here, so that it travels by value.
    class Controller:
        async def run(self) -> None:
            """Wait for nodes, as Ray Train's controller does: nothing is awaited."""
            time.sleep(0 if answers else 600)

        async def abort(self) -> None:
            ray.actor.exit_actor()

    monkeypatch.setattr(interrupt, "_ABORT_S", 60.0 if answers else 1.0)
    controller: Any = ray.remote(Controller).options(num_cpus=0).remote()
    before = signal.getsignal(signal.SIGINT)
    try:
        abort_at_interrupt(controller)
        running = controller.run.remote()
        with pytest.raises(SystemExit):
            interrupt_myself(running)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(RayActorError):
        ray.get(controller.abort.remote(), timeout=30)


def test_drained_nodes_whose_workers_did_not_begin_are_told_once(tmp_path: Path) -> None:
    sent: list[Exception] = [Refused(7, 20.0), RuntimeError("lost peer"), Refused(7, 10.0)]
    errors = {rank: pickle.loads(pickle.dumps(error)) for rank, error in enumerate(sent)}
    assert str(errors[0]) == "preempted before step 8"
    assert charge_of(errors.values()) == "pause"
    lines = deque[str]()
    board = SimpleNamespace(say=SimpleNamespace(remote=lines.append))
    state = RestartingState(training_failed_error=WorkerGroupError("three failed", errors))
    NotePreemptions(str(tmp_path), board).after_controller_state_update(InitializingState(), state)
    (event,) = read_events(str(tmp_path))
    assert (event["event"], event["ranks"], event["step"]) == ("preempted", [0, 2], 7)
    assert event["deadline"] == "1970-01-01T00:00:10+00:00"
    assert list(lines) == ["preempted: the nodes of workers [0, 2] go; no step is lost"]
