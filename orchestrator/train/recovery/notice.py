"""What tells a run to stop and go on elsewhere, and how its workers agree on the step. No torch.

Light: the controller imports it, and `Paused` travels to it.
"""

import dataclasses
import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from ray.exceptions import RayActorError, RayError

from orchestrator import cluster

_log = logging.getLogger(__name__)

# What a notice costs to see: half of this on average, out of the 30 s that clouds give.
_POLL_S = 0.5
_LOOK_EVERY_S = 0.5
NOTICE_S = 30.0
"""What most clouds, and Ray at a SIGTERM, give."""
NOTICE_MARGIN = 1.5
"""Part of a notice is over when it is seen, and the next save may take longer than the last."""
_SAVES_APART = 4

Charge = Literal["pause", "preemption", "failure"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notice:
    """What worker 0 has seen and all are to act upon at a step's end."""

    reason: Literal["preempted", "room", "slow_save"]
    """preempted: nodes of theirs are being drained; room: the cluster holds more workers;
    slow_save: a checkpoint at a notice would come too late."""
    ranks: tuple[int, ...] = ()
    """Workers on the drained nodes."""
    deadline_s: float | None = None
    """When the first of these nodes goes, in seconds since 1970; None: not known."""
    workers: int = 0
    """How many workers there is room for."""
    save_s: float = 0.0
    """What the last checkpoint took to be saved."""

    @property
    def every_s(self) -> float:
        """How often to commit instead: so that saving takes a quarter of the time, beside steps."""
        return _SAVES_APART * self.save_s


class Paused(Exception):
    """Workers stopped after a commit, so that the run goes on on other workers: no failure."""


class Refused(Paused):
    """A worker has not begun, since its node is being drained.

    Args:
        step: of the checkpoint that its start would have gone on from.
        deadline_s: when the node goes, in seconds since 1970; None: not known.
    """

    def __init__(self, step: int, deadline_s: float | None) -> None:
        super().__init__(step, deadline_s)  # so that it is pickled whole
        self.step, self.deadline_s = step, deadline_s

    def __str__(self) -> str:
        return f"preempted before step {self.step + 1}"


def charge_of(errors: Iterable[BaseException], *, draining: bool = False) -> Charge:
    """Return what the errors of a worker group are to be charged to.

    Where one worker's node was taken away, the others only lose their connection to it; so one
    preempted worker makes a preemption of all.

    Args:
        errors: what the workers ended with.
        draining: a node of theirs is being drained: it takes no new actors, such as readers.
    """
    inner = [getattr(error, "health_check_failure", None) or error for error in errors]
    if any(isinstance(error, Paused) for error in inner):
        return "pause"
    if any(isinstance(error, RayActorError) and error.preempted for error in inner):
        return "preemption"
    if draining and any(isinstance(cluster.root_cause(error), RayError) for error in inner):
        return "preemption"
    return "failure"


def drained(nodes: Sequence[str], draining: Mapping[str, int]) -> Notice | None:
    """Return the notice that draining nodes are to a run's workers, or None.

    Args:
        nodes: the node of each worker, by rank.
        draining: node -> deadline in ms since 1970, 0 where there is none, as Ray's GCS says.
    """
    ranks = tuple(rank for rank, node in enumerate(nodes) if node in draining)
    if not ranks:
        return None
    known = [draining[nodes[rank]] for rank in ranks if draining[nodes[rank]]]
    deadline_s = min(known) / 1000 if known else None
    return Notice(reason="preempted", ranks=ranks, deadline_s=deadline_s)


def slow_save(save_s: float) -> Notice | None:
    """Return what to do where a save took so long that it would not fit a notice, else None."""
    if NOTICE_MARGIN * save_s <= NOTICE_S:
        return None
    return Notice(reason="slow_save", save_s=save_s)


@dataclasses.dataclass(frozen=True)
class Interval:
    """How often a run commits, whatever happens."""

    every_steps: int
    is_lowered: bool
    """Whether it was longer before."""

    @property
    def words(self) -> str:
        """The end of a sentence about it."""
        return f"{'lowered to' if self.is_lowered else 'stays at'} {self.every_steps} steps"


def lowered(
    to_s: float, *, before_s: float | None, before_steps: int | None, steps_per_s: float
) -> Interval:
    """Return the interval that holds where commits are wanted every `to_s` seconds at least.

    Args:
        to_s: seconds.
        before_s: the one by time so far, if there is one.
        before_steps: the one by steps, if there is one.
        steps_per_s: how fast the run is.
    """
    steps = max(1, round(to_s * steps_per_s))
    before = [before_steps] if before_steps else []
    before += [max(1, round(before_s * steps_per_s))] if before_s else []
    return Interval(min([steps, *before]), steps < min([*before, steps + 1]))


def preempted_event(
    ranks: Sequence[int], deadline_s: float | None, *, step: int | None
) -> dict[str, Any]:
    """Return the fields of a preemption's event; `step` was committed before it, None: none was."""
    deadline = None
    if deadline_s is not None:
        deadline = datetime.datetime.fromtimestamp(deadline_s, datetime.UTC).isoformat()
    ranks = list(ranks)
    return {
        "kind": "preempted",
        "ranks": ranks,
        "deadline": deadline,
        "step": step,
        "committed": step is not None,
    }


class Watch:
    """A thread of worker 0 that looks for notices; the newest is in `notice`.

    Args:
        look: returns the notice that holds now, or None.
        poll_s: seconds between looks.
    """

    def __init__(self, look: Callable[[], Notice | None], *, poll_s: float = _POLL_S) -> None:
        self.notice: Notice | None = None
        self._look = look
        self._poll_s = poll_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._done.set()

    def look(self) -> None:
        """Look now."""
        try:
            self.notice = self._look()
        except Exception as error:  # the GCS may be away for a while: look again
            _log.warning("cannot look for drained nodes: %s", error)

    def _run(self) -> None:
        while not self._done.is_set():
            self.look()
            self._done.wait(self._poll_s)


class Looks:
    """At which steps workers hear what worker 0 has seen: some twice a second, known to all.

    Args:
        step: the step that training starts at.
        every_s: seconds between looks.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        step: int,
        every_s: float = _LOOK_EVERY_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._every_s = every_s
        self._clock = clock
        self._looked, self._from_step = clock(), step
        self._gap = 1
        self._look_at = step + 1
        self.steps_per_s = 0.0
        """Between the last two looks."""

    def hear(
        self,
        step: int,
        see: Callable[[], Notice | None],
        agree: Callable[[Any], Any],
        *,
        now: bool = False,
    ) -> Notice | None:
        """Return what worker 0 sees, on all workers; `agree` is a collective that returns it.

        With `now`, the same on all workers, whatever the schedule says.

        Steps may become slower: the gap at most doubles, and shrinks at once.
        """
        if step < self._look_at and not now:
            return None
        moment = self._clock()
        self.steps_per_s = (step - self._from_step) / max(moment - self._looked, 1e-9)
        gap = max(1, min(2 * self._gap, int(self.steps_per_s * self._every_s)))
        notice, self._gap = agree((see(), gap))
        self._looked, self._from_step = moment, step
        self._look_at = step + self._gap
        return notice  # type: ignore[no-any-return]
