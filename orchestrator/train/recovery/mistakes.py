"""Controller side: what ended a worker, and whether to start again. Light: no torch, no Lightning.

Ray Train's own count of failures is switched off: it neither forgets nor tells them apart, and it
does not know the step.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState

from orchestrator import cluster
from orchestrator.config import TrainConfig, UserError
from orchestrator.run import append_event, failures_since_submission
from orchestrator.storage import StorageError
from orchestrator.train.errors import Diverged, OutOfMemory
from orchestrator.train.recovery import elastic
from orchestrator.train.recovery.failures import (
    Cause,
    CodeError,
    Failure,
    FailureCount,
    StandstillError,
    Verdict,
    step_of,
)
from orchestrator.train.recovery.notice import charge_of
from orchestrator.train.recovery.starting import StartFailed
from orchestrator.train.saving import groups

_BOARD_TIMEOUT_S = 5.0
# A worker that does not answer does not leave its process group either; Ray waits 30 s for that.
_GROUP_SHUTDOWN_S = "2"
# What gloo and NCCL say in the workers that lost another one.
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|peer|socket", re.IGNORECASE
)


class GaveUp(RuntimeError):
    """The failures that end a run, in one sentence.

    Args:
        sentence: what happened and what to do.
        trace: the last failure's own trace.
    """

    def __init__(self, sentence: str, trace: str) -> None:
        super().__init__(sentence, trace)  # so that it is pickled whole
        self.sentence, self.trace = sentence, trace

    def __str__(self) -> str:
        return self.sentence


@dataclasses.dataclass(frozen=True)
class Found:
    """What ended the workers."""

    error: str
    cause: Cause
    step: int | None
    """Steps done, where the error knows."""
    rank: int


def diagnose(errors: Mapping[int, BaseException], *, hang_timeout_s: float) -> Found:
    """Return which worker's error is the cause; the others only lost their connection to it.

    Raises:
        UserError: it is a mistake of the user's, which another start would only meet again. What
            storage refuses is none: it may have passed by the next start.
    """
    roots = {rank: cluster.root_cause(error) for rank, error in errors.items()}
    for cause in roots.values():
        if isinstance(cause, UserError) and not isinstance(cause, StorageError):
            kind = Diverged if isinstance(cause, Diverged) else UserError
            raise kind(cluster.sentence(cause)) from cause
    rank = min(errors, key=lambda rank: (_guilt(errors[rank], roots[rank]), rank))
    error, root = errors[rank], roots[rank]
    if isinstance(error, WorkerHealthCheckTimeoutError):
        said = f"worker {rank} did not answer for train.hang_timeout_s={hang_timeout_s:g}"
        return Found(said, "hang", None, rank)
    if isinstance(error, WorkerHealthCheckFailedError):
        return Found(_death(rank, error), "process", None, rank)
    if isinstance(root, RayActorError):
        said = f"an actor that feeds worker {rank} ended unexpectedly{_on_node(str(root))}"
        return Found(said, "loader", step_of(error), rank)
    if _is_lost_peer(root):
        return Found("the workers lost their connection to each other", "process", None, rank)
    if isinstance(root, StandstillError):
        return Found(str(root), "hang", step_of(error), rank)
    if isinstance(root, StorageError):
        return Found(cluster.sentence(root), "storage", step_of(error), rank)
    said = root.said if isinstance(root, CodeError) else _in_words(root)
    return Found(said, "code", step_of(error), rank)


def diagnose_start(failed: StartFailed, *, hang_timeout_s: float) -> Found:
    """Return which worker did not start, and why.

    Raises:
        UserError: as `diagnose` does.
    """
    if failed.late_s:
        ranks = ", ".join(map(str, sorted(failed.errors))) or "(which, is not known)"
        who = f"worker {ranks}" if len(failed.errors) == 1 else f"workers {ranks}"
        said = f"{who} did not start within {failed.late_s:g} s"
        return Found(said, "hang", None, 0)
    if failed.errors:
        return diagnose(failed.errors, hang_timeout_s=hang_timeout_s)
    said = f"a worker's process ended while it started{_on_node(str(failed.__cause__))}"
    return Found(said, "process", None, 0)


def _guilt(error: BaseException, root: BaseException) -> int:
    """Return how likely an error is the cause: 0 most."""
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return 2
    if isinstance(error, WorkerHealthCheckFailedError):
        return 1
    if isinstance(root, RayActorError):
        return 3
    return 4 if _is_lost_peer(root) else 0


def _is_lost_peer(root: BaseException) -> bool:
    said = root.said if isinstance(root, CodeError) else _in_words(root)
    kind = said.partition(":")[0]
    return kind in ("RuntimeError", "DistBackendError", "DistNetworkError") and bool(
        _LOST_PEER.search(said)
    )


def _in_words(root: BaseException) -> str:
    return f"{type(root).__name__}: {cluster.sentence(root)}".rstrip(": ")


def _death(rank: int, error: BaseException) -> str:
    why = str(getattr(error, "health_check_failure", ""))
    return (
        f"worker {rank}'s process ended unexpectedly{_on_node(why)}: it was killed, ran out of "
        "memory or crashed in native code"
    )


def _on_node(words: str) -> str:
    found = re.search(r"\bip: (\S+)", words)
    return f" on node {found[1]}" if found else ""


class FailurePolicy(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Counts failures of the workers and ends the run where another start would not help.

    Args:
        run: URI of the run's folder.
        token: what the start's workers commit with, see groups.py.
        board: handle of the progress board actor.
        settings: how many failures to survive, and when a worker counts as hanging.
    """

    def __init__(self, run: str, token: str, board: Any, settings: TrainConfig) -> None:
        self._run = run
        self._token = token
        self._board = board
        self._settings = settings
        self._lacked: set[tuple[str, int]] = set()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Go on counting where an earlier controller of the same driver ended."""
        os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", _GROUP_SHUTDOWN_S)
        self._count = FailureCount(
            max_failures=self._settings.max_failures,
            clock=time.time,
            earlier=[Failure(**fields) for fields in failures_since_submission(self._run)],
        )
        self._board.keep.remote("controller", ray.get_runtime_context().current_actor)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Tell the board that no step of this start is made yet, and what is not this start's."""
        self._board.start.remote()
        self._board.keep.remote("groups_of_others", cluster.groups_of_job())
        with contextlib.suppress(StorageError):  # earlier workers are ended by other means, too
            groups.announce(self._run, self._token, worker_group_context.run_attempt_id)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Leave with the board what would stay behind if this process were killed."""
        self._nodes, self._decided = elastic.nodes_of(worker_group), False
        state = worker_group.get_worker_group_state()
        self._board.keep.remote("placement_group", state.placement_group_handle.placement_group)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Decide about what the workers raised: Ray Train ends a run whose callbacks raise.

        Raises:
            UserError: a mistake of the user's.
            GaveUp: too many failures, or the same one again and again.
        """
        errors = worker_group_status.errors
        if self._decided:
            return  # Ray waits out a node's notice, and polls what has failed again
        draining = bool(errors) and not self._nodes.isdisjoint(elastic.draining_nodes())
        if not errors or charge_of(errors.values(), draining=draining) != "failure":
            return
        found = diagnose(errors, hang_timeout_s=self._settings.hang_timeout_s)
        if worker_group_status.has_preempted_worker() or (
            found.cause == "process" and worker_group_status.get_preemption_info() is not None
        ):
            return
        self._decided = True
        if self._has_remedy(cluster.root_cause(errors[found.rank])):
            return
        step = found.step if found.step is not None else self._shown_step()
        trace = str(worker_group_status.worker_statuses[found.rank].error)
        self._add(found.error, found.cause, step, trace)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Count workers that end while they start: Ray Train would try for ever."""
        if current_state is previous_state:
            return  # it waits for nodes, and says so again and again
        error = getattr(current_state, "training_failed_error", None)
        failed = getattr(error, "controller_failure", None)
        if not isinstance(current_state, ReschedulingState) or not isinstance(failed, StartFailed):
            return
        draining = not failed.nodes.isdisjoint(elastic.draining_nodes())
        if charge_of(failed.errors.values(), draining=draining) == "failure":
            found = diagnose_start(failed, hang_timeout_s=self._settings.hang_timeout_s)
            self._add(found.error, found.cause, None, str(failed.__cause__))

    def _has_remedy(self, root: BaseException) -> bool:
        """Return whether the next start asks for less memory: not where it met this size before.

        That is so where few validation images leave workers no smaller batches (`Batching`).
        """
        if not isinstance(root, OutOfMemory) or (root.setting, root.size) in self._lacked:
            return False
        self._lacked.add((root.setting, root.size))
        return True

    def _add(self, error: str, cause: Cause, step: int | None, trace: str) -> None:
        verdict = self._count.add(error, cause=cause, step=step)
        record_failure(self._run, error, cause=cause, step=step, verdict=verdict)
        self._board.say.remote(describe(error, step, verdict, self._settings.max_failures))
        if verdict.give_up:
            raise GaveUp(verdict.give_up, trace)

    def _shown_step(self) -> int | None:
        try:
            step: int | None = ray.get(self._board.made.remote(), timeout=_BOARD_TIMEOUT_S)
        except RayError:  # the board is only lent: without it, no step is known
            return None
        return step


def record_failure(
    run: str, error: str, *, cause: Cause, step: int | None, verdict: Verdict
) -> None:
    """Add the event of a failure, where storage takes it."""
    action = "give up" if verdict.give_up else "restart"
    with contextlib.suppress(StorageError):  # the run must go on; the board says it too
        append_event(
            run, "failure", error=error, cause=cause, step=step, count=verdict.count, action=action
        )


def describe(error: str, step: int | None, verdict: Verdict, most: int) -> str:
    """Return the line for a person."""
    where = "while starting" if step is None else f"at step {step}"
    what = "giving up" if verdict.give_up else "starting again from the last checkpoint"
    counted = f" {verdict.count} (of at most {most} in 24 h)" if verdict.counted and most else ""
    return f"failure{counted} {where}: {error}; {what}"
