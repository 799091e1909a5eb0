"""Worker side: how fast a run goes and how long it waits for data."""

import time
from collections.abc import Callable, Mapping

from orchestrator.train.timing.timeline import Part, Timeline


class Pace:
    """What the time since the run's first step went to, restarts included.

    Args:
        waited_s: returns the seconds this process has waited for data so far.
        totals: what `totals` said at the checkpoint that this start goes on from.
        step: the step that training starts at.
    """

    def __init__(
        self, waited_s: Callable[[], float], totals: Mapping[str, float], *, step: int
    ) -> None:
        self._waited_s = waited_s
        self._train_s = totals.get("train_s", 0.0)
        self._wait_s = totals.get("wait_s", 0.0)
        self._first = (self._train_s, self._wait_s, step)
        self.timeline = Timeline()
        self._mark()

    def start(self) -> None:
        """Begin a stretch of training."""
        self.timeline.enter("other")
        self._mark()

    def stop(self, then: Part = "other") -> None:
        """End the stretch: what follows (validation, a commit) is no training time."""
        self._train_s += time.perf_counter() - self._began
        self._wait_s += self._waited_s() - self._waited
        self._mark()
        self.timeline.enter(then)

    def _mark(self) -> None:
        self._began, self._waited = time.perf_counter(), self._waited_s()

    @property
    def _seconds(self) -> float:
        """Seconds of training since this process began it."""
        return self._train_s - self._first[0] + time.perf_counter() - self._began

    @property
    def wait_share(self) -> float | None:
        """Share of this process's training that went into waiting for data."""
        waited = self._wait_s - self._first[1] + self._waited_s() - self._waited
        return min(1.0, waited / self._seconds) if self._seconds > 0 else None

    def steps_per_s(self, step: int) -> float:
        """Return the speed since this process began training."""
        return (step - self._first[2]) / self._seconds if self._seconds > 0 else 0.0

    @property
    def totals(self) -> dict[str, float]:
        """What a checkpoint carries on: train_s, wait_s."""
        return {"train_s": self._train_s, "wait_s": self._wait_s}


class Schedule:
    """When the next checkpoint by time is due, in steps, so that all workers agree.

    Args:
        every_s: seconds between commits; None or 0: never by time.
        first_look: steps after which the clock is looked at first.
    """

    def __init__(self, every_s: float | None, *, step: int, first_look: int = 5) -> None:
        self.every_s = every_s
        """Seconds between commits now; None or 0: never by time."""
        self._first_look = first_look
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from a commit at `step`."""
        self._began, self._from_step = time.perf_counter(), step
        self._look_at = step + self._first_look

    def shorten(self, every_s: float, *, step: int) -> None:
        """From `step` on commit at least this often; all workers call it at the same step."""
        self.every_s = min(every_s, self.every_s or every_s)
        self._look_at = step + 1

    def due(self, step: int, agree: Callable[[int], int]) -> bool:
        """Return whether to commit now; `agree` is a collective that returns rank 0's value.

        Only at steps that all workers know beforehand does rank 0's clock decide: commit now, or
        look again after as many steps as fit into the time left.
        """
        if not self.every_s or step < self._look_at:
            return False
        elapsed = time.perf_counter() - self._began
        left = self.every_s - elapsed
        steps = int(left * (step - self._from_step) / elapsed)
        wait = agree(max(1, steps) if left > 0 else 0)
        self._look_at = step + wait
        return wait == 0
