"""What a run's seconds went to. Pure but for the clock.

Every second belongs to exactly one part, so the parts add up to the wall time by construction. A
worker's own clock covers the time from its first batch to its last save; what lies before, between
and after is reckoned from the times of the run's events.
"""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

Part = Literal[
    "wait",
    "forward_backward",
    "communication",
    "optimizer",
    "checkpoint",
    "validation",
    "restart",
    "startup",
    "other",
]
PARTS: tuple[Part, ...] = get_args(Part)
# What makes progress (the E of ETTR), and what a step of the loop consists of.
PRODUCTIVE: tuple[Part, ...] = ("forward_backward", "communication", "optimizer")
STEP: tuple[Part, ...] = ("wait", *PRODUCTIVE, "other")
# Events of what ends a start of the workers, so that another one begins.
_ENDINGS = ("failure", "preempted", "out_of_memory")
# Before the name of a part, in a manifest's stats.
_PREFIX = "time_"


class Timeline:
    """Seconds by part on one thread; exactly one part runs at any time.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.perf_counter
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; "other" runs from now on."""
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "other"
        self._since = self._clock()

    def enter(self, part: Part) -> Part:
        """Let `part` run from now on, and return the part that ran."""
        now = self._clock()
        before = self._part
        self._seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    def move(self, seconds: float, *, source: Part, to: Part) -> None:
        """Count seconds of `source`, which another clock knows more about, as `to`."""
        self._seconds[source] -= seconds
        self._seconds[to] += seconds

    @property
    def seconds(self) -> dict[Part, float]:
        """Seconds by part up to now."""
        self.enter(self._part)
        return dict(self._seconds)


def step_seconds(seconds: Mapping[Part, float]) -> float:
    """Return what steps took: without saving, validating, starting."""
    return sum(seconds[part] for part in STEP)


def to_stats(seconds: Mapping[Part, float]) -> dict[str, float]:
    """Return seconds by part as a manifest carries them."""
    return {f"{_PREFIX}{part}": seconds[part] for part in PARTS}


def from_stats(stats: Mapping[str, float]) -> dict[Part, float]:
    """Return seconds by part; 0 where a manifest does not have them."""
    return {part: stats.get(f"{_PREFIX}{part}", 0.0) for part in PARTS}


Events = Sequence[Mapping[str, Any]]


def moment_of(event: Mapping[str, Any]) -> float:
    """Return when an event was written, in seconds since 1970."""
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def since_submission(events: Events) -> Events:
    """Return the events of the session that is the newest."""
    begins = [i for i, event in enumerate(events) if event["event"] == "submitted"]
    return events[begins[-1] :] if begins else events


def restarted_at(events: Events, *, saved_at: float) -> float | None:
    """Return when the newest start of the workers fell due; None: when the run was submitted.

    Args:
        events: of the run, this start's "training" among them.
        saved_at: when the checkpoint that it goes on from was saved; 0: there is none. Workers that
            end themselves to be more of them write nothing else before they are started again.
    """
    mine = since_submission(events)
    starts = [i for i, event in enumerate(mine) if event["event"] == "training"]
    before = mine[: starts[-1]] if starts else mine
    moments = [moment_of(event) for event in before if event["event"] in _ENDINGS]
    if starts[1:] and saved_at > moment_of(mine[0]):
        moments.append(saved_at)
    return max(moments, default=None)


def sessions(events: Events, *, saved_at: float, now: float) -> list[tuple[float, float]]:
    """Return from when to when the run was allocated: once for each time it was submitted.

    A session ends with its last event. Of one that was killed, it is not known for how long it
    lived after that; a checkpoint saved later shows that it lived until then.

    Args:
        events: of the run, in order.
        saved_at: when the last checkpoint was saved; 0: never.
        now: the end of the last session, unless the run has finished.
    """
    begins = [i for i, event in enumerate(events) if event["event"] == "submitted"]
    spans = []
    for number, first in enumerate(begins):
        is_last = number + 1 == len(begins)
        mine = events[first:] if is_last else events[first : begins[number + 1]]
        begin, end = moment_of(mine[0]), max(moment_of(event) for event in mine)
        if is_last and mine[-1]["event"] != "finished":
            end = now
        elif not is_last and begin <= saved_at <= moment_of(events[begins[number + 1]]):
            end = max(end, saved_at)
        spans.append((begin, end))
    return spans


def allocated_s(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Return for how many seconds between two moments the run was allocated."""
    return sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in spans)


def allocated_until(stats: Mapping[str, float]) -> float:
    """Return for how many seconds the run was allocated until a checkpoint was saved.

    Checkpoints carry it on: of a session that was killed, nothing else keeps when it last lived.
    """
    # Runs of before do not have it, but their parts, which add up to it.
    return stats.get("allocated_s", sum(from_stats(stats).values()))


def last_sign(events: Events, *, saved_at: float) -> float:
    """Return when a run is last known to have lived, in seconds since 1970; 0: never."""
    return max([saved_at, *(moment_of(event) for event in events)])


def time_before(events: Events, *, saved_at: float, now: float) -> tuple[float, float]:
    """Return the seconds of start-up and of restart that lie behind a start's first batch.

    Restart is all that was allocated since the checkpoint that the start goes on from, so that the
    steps that are done again count as lost; without one, all since the first start began training.

    Args:
        events: of the run up to this start.
        saved_at: when the checkpoint was saved; 0: there is none.
        now: when the first batch came.
    """
    spans = sessions(events, saved_at=saved_at, now=now)
    trained = [moment_of(event) for event in events if event["event"] == "training"]
    if saved_at:
        return 0.0, allocated_s(spans, saved_at, now)  # the start-up is in the checkpoint's totals
    first = trained[0] if trained else now
    return allocated_s(spans, 0.0, first), allocated_s(spans, first, now)
