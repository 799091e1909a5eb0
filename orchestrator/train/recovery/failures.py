"""Which failures are worth another start: counts them and decides. Pure: time is passed in."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from orchestrator.config import UserError

Cause = Literal["code", "storage", "process", "hang", "loader", "controller"]
"""code: the training code raised; storage: storage refused or did not answer; process: a worker's
process ended; hang: a worker stopped answering or stepping; loader: an actor that feeds the workers
ended; controller: Ray Train's own actor ended."""

WINDOW_S = 24 * 3600.0
"""Failures that lie further back are forgotten."""
SAME_FAILURES = 3
"""Times that one failure at one step ends the run: another start would only meet it again."""
STUCK_FAILURES = 5
"""Times that it does without getting further: which step a process dies in is only known to the
half second, in which a small model makes a hundred."""

# Modules whose exceptions are told apart by their class.
_READABLE = ("orchestrator.", "ray.")

_REMEDY: dict[Cause, str] = {
    "code": "mend the code, or the data of that step",
    "storage": "mend the storage",
    "process": "see the nodes' logs for what ends the process: too little memory, or a crash in "
    "native code",
    "hang": "see where the workers' stacks stand still, or raise train.hang_timeout_s",
    "loader": "see the nodes' logs for what ends the reader: too little memory, or a crash in "
    "native code",
    "controller": "see the log of the driver's node for what ends Ray Train's controller",
}


class CodeError(RuntimeError):
    """What the training code raised, in words: its own class may not be known elsewhere.

    Args:
        said: the name of the exception's class, and its first line.
        step: steps done when it was raised; None: before the first.
    """

    def __init__(self, said: str, step: int | None) -> None:
        super().__init__(said, step)  # so that it is pickled whole
        self.said, self.at_step = said, step

    def __str__(self) -> str:
        return self.said


class StandstillError(RuntimeError):
    """Workers that answer, but whose step does not end."""


def mark_step(error: BaseException, step: int) -> None:
    """Note on an exception how many steps were done when it was raised."""
    with contextlib.suppress(AttributeError):  # a class with slots
        error.at_step = step  # type: ignore[attr-defined]


def step_of(error: BaseException) -> int | None:
    """Return what `mark_step` noted."""
    step = getattr(error, "at_step", None)
    return step if isinstance(step, int) else None


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Let the block raise only what the controller can read: it lacks the user's modules."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or type(error).__module__.startswith(_READABLE):
            raise
        lines = str(error).splitlines()
        said = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
        raise CodeError(said, step_of(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure of a run's workers."""

    error: str
    """What happened, in one line."""
    cause: Cause
    step: int | None
    """Steps done when it happened; None: this start had not made its first step."""
    at: float
    """When it happened, in seconds since 1970."""

    @property
    def counts(self) -> bool:
        """Whether it is one of `max_failures`.

        A reader that dies under way is no failure of the user's; that it never gets on is.
        """
        return self.cause != "loader" or self.step is None

    @property
    def reached(self) -> int:
        """Steps done; -1: none of this start's."""
        return -1 if self.step is None else self.step

    @property
    def where(self) -> str:
        """Return the step, for a person."""
        return "before the first step of its start" if self.step is None else f"at step {self.step}"

    @property
    def signature(self) -> tuple[str, str] | None:
        """What two failures share that are the same; None: it is like no other.

        Storage fails and processes end for reasons outside of the run, too: the one says nothing
        about a step, the other nothing while the run starts up, and little where it is another
        worker's or another node's.
        """
        if self.cause == "storage" or (self.step is None and self.cause != "code"):
            return None
        numbers = r"0x[0-9a-f]+" if self.cause == "process" else r"0x[0-9a-f]+|\d+"
        return self.cause, re.sub(numbers, "#", self.error)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is to be done about a failure."""

    count: int
    """Failures that counted within the window, this one with them."""
    give_up: str
    """Why the run ends, in one sentence; empty: it starts again from its last checkpoint."""
    counted: bool = True
    """Whether this one is among them."""


class FailureCount:
    """Counts the failures of one run.

    Args:
        max_failures: failures within 24 hours that a run survives.
        clock: seconds since 1970.
        earlier: failures of earlier controllers of the same driver.
    """

    def __init__(
        self, *, max_failures: int, clock: Callable[[], float], earlier: Iterable[Failure] = ()
    ) -> None:
        self._max_failures = max_failures
        self._clock = clock
        self._failures = list(earlier)

    def add(self, error: str, *, cause: Cause, step: int | None) -> Verdict:
        """Count a failure that happened just now and decide about it."""
        now = self._clock()
        new = Failure(error=error, cause=cause, step=step, at=now)
        self._failures = [f for f in self._failures if now - f.at < WINDOW_S] + [new]
        count = sum(failure.counts for failure in self._failures)
        return Verdict(count, self._give_up(new, count), new.counts)

    def _give_up(self, new: Failure, count: int) -> str:
        same = self._same_as(new) if self._max_failures > 0 else []
        if sum(failure.step == new.step for failure in same) >= SAME_FAILURES:
            return _same(new, f"three times {new.where}")
        if len(same) >= STUCK_FAILURES:
            often = f"{len(same)} times without getting beyond step {same[0].step}"
            return _same(new, often)
        if new.counts and count > self._max_failures:
            return _too_many(new, count, self._max_failures)
        return ""

    def _same_as(self, new: Failure) -> list[Failure]:
        """Return the new failure and those like it, from one on that none has got beyond."""
        if new.signature is None:
            return []
        first, reached = 0, -1
        for i, failure in reversed(list(enumerate(self._failures))):
            reached = max(reached, failure.reached)
            if failure.signature == new.signature and failure.reached == reached:
                first = i
        return [f for f in self._failures[first:] if f.signature == new.signature]


def _same(failure: Failure, how_often: str) -> str:
    return f"same failure {how_often}: {failure.error}; {_REMEDY[failure.cause]}"


def _too_many(failure: Failure, count: int, most: int) -> str:
    many = f"; the {count}. failure within 24 hours, more than" if most else ", and"
    said = f"{failure.error} ({failure.where}{many} train.max_failures={most})"
    return f"{said}; {_REMEDY[failure.cause]}, or raise train.max_failures"
