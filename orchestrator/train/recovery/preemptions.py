"""Controller side: preemptions that came too fast for the workers to write them down."""

import contextlib
from typing import Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, RestartingState
from ray.train.v2.api.exceptions import PreemptionError

from orchestrator.run import append_event
from orchestrator.storage import StorageError
from orchestrator.train.recovery import elastic
from orchestrator.train.recovery.mistakes import diagnose
from orchestrator.train.recovery.notice import Refused, charge_of, preempted_event
from orchestrator.train.recovery.starting import StartFailed


class NotePreemptions(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Writes down preemptions that came too fast for the workers to do so, and says who waits.

    Args:
        run: URI of the run's folder.
        board: the progress board.
    """

    def __init__(self, run: str, board: Any) -> None:
        self._run = run
        self._board = board
        self._nodes: set[str] = set()
        self._said = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note whose draining matters."""
        self._nodes, self._said = elastic.nodes_of(worker_group), False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Look at why workers are about to start again."""
        if current_state is previous_state:
            return  # it waits for nodes, and says so again and again
        error = getattr(current_state, "training_failed_error", None)
        failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
        failed = getattr(error, "controller_failure", None)
        if isinstance(failed, WorkerGroupStartupTimeoutError) and not self._said:
            self._said = True
            self._board.say.remote("waiting for nodes: the workers found no place so far")
        nodes = self._nodes
        if isinstance(failed, StartFailed):
            failures, nodes = failed.errors, set(failed.nodes)
        elif error is None or not isinstance(current_state, RestartingState):
            return
        refused = {r: e for r, e in failures.items() if isinstance(e, Refused)}
        if refused:
            self._note_refused(refused)
            return
        draining = not nodes.isdisjoint(elastic.draining_nodes())
        charge = charge_of(failures.values(), draining=draining)
        known = isinstance(error, PreemptionError) or (
            # Else a failure that only fell into a notice's time.
            isinstance(previous_state, PreemptingState)
            and diagnose(failures, hang_timeout_s=0).cause == "process"
        )
        if charge == "pause" or not (known or charge == "preemption"):
            return
        info = getattr(error, "preemption_info", None)
        ranks = sorted(failures) if info is None else info.preempted_ranks
        deadline_s = info.deadline_ms / 1000 if info is not None and info.deadline_ms else None
        with contextlib.suppress(StorageError):  # the run must go on; the board says it too
            append_event(self._run, **preempted_event(ranks, deadline_s, step=None))
        self._board.say.remote(
            f"preempted: workers {ranks} went before a checkpoint was committed; going on from the "
            "last one"
        )

    def _note_refused(self, refused: dict[int, Refused]) -> None:
        """Write down once that nodes were drained before the first step of their workers."""
        ranks, step = sorted(refused), next(iter(refused.values())).step
        deadline_s = min((e.deadline_s for e in refused.values() if e.deadline_s), default=None)
        with contextlib.suppress(StorageError):  # as above
            append_event(self._run, **preempted_event(ranks, deadline_s, step=step))
        self._board.say.remote(f"preempted: the nodes of workers {ranks} go; no step is lost")
