"""Driver side: start Ray Train's controller again where its process died."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import PlacementGroupID
from ray.exceptions import RayActorError, RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from orchestrator import cluster
from orchestrator.run import failures_since_submission
from orchestrator.train.job import Job
from orchestrator.train.recovery.failures import Failure, FailureCount
from orchestrator.train.recovery.mistakes import GaveUp, describe, record_failure
from orchestrator.train.saving.lease import Lease

_BOARD_TIMEOUT_S = 5.0


def fit_again(job: Job, lease: Lease, start: Callable[[Job], None]) -> None:
    """Call `start` with a job of a token of its own, again where the controller's process died.

    Raises:
        GaveUp: it died too often.
        LeaseLostError: another driver has the run now.
    """
    while True:
        try:
            start(dataclasses.replace(job, lease=lease.renew()))
            return
        except RayActorError as error:
            step = _read(job.board.made)
            _clear(_read(job.board.kept) or {}, alone=job.share == 1)
            _count(job, step, str(error))


def _count(job: Job, step: int | None, trace: str) -> None:
    earlier = [Failure(**fields) for fields in failures_since_submission(job.run)]
    most = job.config.train.max_failures
    count = FailureCount(max_failures=most, clock=time.time, earlier=earlier)
    said = "the process of Ray Train's controller ended unexpectedly"
    verdict = count.add(said, cause="controller", step=step)
    record_failure(job.run, said, cause="controller", step=step, verdict=verdict)
    job.board.say.remote(describe(said, step, verdict, most))
    if verdict.give_up:
        raise GaveUp(verdict.give_up, trace)


def _read(method: Any) -> Any:
    with contextlib.suppress(RayError):  # it may have died with the controller
        return ray.get(method.remote(), timeout=_BOARD_TIMEOUT_S)
    return None


def _clear(kept: dict[str, Any], *, alone: bool) -> None:
    """Free what the dead controller's workers hold: Ray frees it only when the job ends.

    A controller that dies while workers start leaves a group that nobody was told of; where no
    other run may be starting workers in the same job, it is known by not having been there before.
    """
    with contextlib.suppress(RayError, ValueError):
        if "controller" in kept:
            ray.kill(kept["controller"])  # it may only have been out of reach
    with contextlib.suppress(RayError):
        if "placement_group" in kept:
            remove_placement_group(kept["placement_group"])
    if alone and "groups_of_others" in kept:
        for left in cluster.groups_of_job() - kept["groups_of_others"]:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(left))))
