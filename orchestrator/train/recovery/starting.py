"""Controller side: workers that die or stand still while they start, so that Ray tries again.

Ray Train 2.60 waits for its workers without a limit, and what fails once they have a context leaves
their placement group behind, with which the next start waits for its own CPUs for ever.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util import remove_placement_group

# Workers import torch while they start, which takes a shared disk or a busy machine tens of seconds
# however quick the steps are.
_LEAST_S = 60.0
# Where one worker dies, the others need a moment to notice: the error that says more comes late.
_OTHERS_S = 2.0
# Ray 2.60 forgets an actor whose placement group is removed before it has a process: what waits for
# the actor then waits for ever.
_GONE_S = 30.0


class StartFailed(WorkerGroupStartupFailedError):  # type: ignore[misc]
    """Workers that did not start; Ray Train tries again.

    Args:
        errors: by rank, as Ray Train says them of running workers; empty: it is not known whose.
        late_s: the time that they had and used up; 0: they failed before.
        nodes: where they ran, as far as that is known.
    """

    def __init__(
        self,
        errors: Mapping[int, BaseException],
        *,
        late_s: float = 0.0,
        nodes: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(dict(errors))  # so that it is pickled whole
        self.errors, self.late_s, self.nodes = dict(errors), late_s, nodes


def all_of(answers: Sequence[ray.ObjectRef[Any]]) -> list[Any]:
    """Return what workers answer, by rank.

    Raises:
        StartFailed: one failed.
    """
    waiting, failed = list(answers), False
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_OTHERS_S if failed else None)
        if not done:
            break
        failed = failed or _error(done[0]) is not None
    errors = {rank: _error(a) for rank, a in enumerate(answers) if a not in waiting}
    found = {rank: error for rank, error in errors.items() if error is not None}
    if found:
        raise StartFailed(found)
    return list(ray.get(list(answers)))


def _error(answer: ray.ObjectRef[Any]) -> BaseException | None:
    try:
        ray.get(answer)
    except RayError as error:
        return _as_polled(error)
    return None


def _as_polled(error: BaseException) -> BaseException:
    if not isinstance(error, RayActorError):
        return error
    polled: BaseException = WorkerHealthCheckFailedError("the worker ended", error)
    return polled


class WorkersInTime(WorkerGroup):  # type: ignore[misc]
    """Workers that start within the time in which running ones must answer, or are cleared away."""

    _late_s = 0.0

    def _start(self) -> None:
        self._ended = threading.Event()
        try:
            with self._told():
                try:
                    super()._start()
                finally:
                    self._ended.set()
        except Exception:
            if self.has_started():
                group = self.get_worker_group_state().placement_group_handle.placement_group
                remove_placement_group(group)  # first: its workers answer nobody any more
                self.shutdown()
            raise

    def _create_workers(
        self, num_workers: int, placement_group: Any, *args: Any, **more: Any
    ) -> Any:
        limit_s = max(_LEAST_S, self._worker_health_check_timeout_s)
        threading.Thread(target=self._end, args=(placement_group, limit_s), daemon=True).start()
        return super()._create_workers(num_workers, placement_group, *args, **more)

    def _end(self, placement_group: Any, limit_s: float) -> None:
        """End a start that takes too long."""
        if self._ended.wait(limit_s):
            return
        self._late_s = limit_s
        remove_placement_group(placement_group)  # ends its workers, and with them all waiting
        if not self._ended.wait(_GONE_S):
            os._exit(1)  # the driver starts another controller

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what a worker's end raises, wherever in the start, into what Ray Train retries."""
        try:
            yield
        except WorkerGroupStartupTimeoutError:
            raise  # there is no place for them yet
        except (WorkerGroupStartupFailedError, RayError) as error:
            workers = self.get_workers() if self.has_started() else []
            nodes = frozenset(worker.metadata.node_id for worker in workers)
            errors = error.errors if isinstance(error, StartFailed) else _by_rank(error, workers)
            raise StartFailed(errors, late_s=self._late_s, nodes=nodes) from error


def _by_rank(error: BaseException, workers: Sequence[Any]) -> dict[int, BaseException]:
    died = getattr(error, "actor_id", None)
    ranks = [i for i, worker in enumerate(workers) if worker.actor._actor_id.hex() == died]
    return {rank: _as_polled(error) for rank in ranks}


class StartInTime(ControllerCallback):  # type: ignore[misc]
    """Lets the controller that it is given to start its workers so."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Choose the class of its worker groups: of this process only, which has one controller."""
        TrainController.worker_group_cls = WorkersInTime
