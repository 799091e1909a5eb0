"""Worker side: how fast steps are where data is free: measured on a few, not guessed.

Every worker draws the micro-batches of the next few steps into memory, at a step that all know, and
trains on them from there: the same samples in the same order. What such a step takes is the
ceiling. It includes forward, backward, the exchange and the optimizer, and what Lightning and we do
around them.

Where readers have CPUs of their own, that is done some steps after a start. Where they share the
workers', it is done with a run's last steps, when there is nothing left to read: beside readers
a step took 70 ms that takes 5 ms alone (two cores, two threads that wait for each other at every
operation), and taking off the time in which the kernel ran others left 50. A run that is stopped
early has no ceiling there.

The cost is that the readers may find their buffers full for as long as those few steps take: under
1 % of the steps that are left, by the number of steps that is chosen.
"""

import statistics
from collections.abc import Callable

from orchestrator.data.loader import Loader
from orchestrator.data.plan import Batching
from orchestrator.train.timing.timeline import Part, step_seconds

# Until buffers are filled and clocks of CPUs have settled.
WARM_UP = 20
_MOST = 15
# The loss is reduced and logged at every fifth step: all cycles of it count alike.
_CYCLE = 5
# One step in so many that are left may be held: what it costs is a part of that.
_ONE_IN = 100
_HELD_BYTES = 256 << 20


def steps_to_hold(batching: Batching, *, step: int, image_size: int) -> int:
    """Return how many steps to train from memory; 0: the run is too short, or a step too large."""
    samples = -(-batching.step_samples // batching.num_workers)
    fitting = _HELD_BYTES // (samples * 3 * image_size**2)
    count = min(_MOST, (batching.num_steps - step - WARM_UP) // _ONE_IN, fitting)
    return max(0, count // _CYCLE * _CYCLE)


class Ceiling:
    """One worker's measurement.

    Args:
        loader: its training batches.
        step: the step that training starts at.
    """

    def __init__(self, loader: Loader, *, step: int) -> None:
        self._loader = loader
        self._hold = steps_to_hold(loader.batching, step=step, image_size=loader.image_size)
        last = loader.batching.num_steps - step - self._hold
        self._after = last if loader.shares_cpus else WARM_UP
        self._taken_s: list[float] = []
        # At the last look.
        self._busy_s = 0.0
        self._first_exchange_s = 0.0
        self.own_s: float | None = None
        """Seconds of a step from memory, without the exchange; None: not measured (yet)."""
        self.exchange_s = 0.0
        """Seconds of the exchange in such a step: also waiting for a slower worker."""

    def is_due(self, steps: int) -> bool:
        """Return whether `look` has something to do after so many steps of this start."""
        return bool(self._hold) and self._after <= steps <= self._after + self._hold

    def look(self, steps: int, seconds: Callable[[], dict[Part, float]]) -> None:
        """Fill the memory, or note what the step took that was fed from it.

        Args:
            steps: of this start.
            seconds: returns the timeline's seconds by part.
        """
        now = seconds()
        if steps == self._after:
            self._loader.hold(self._hold)
            self._first_exchange_s = now["communication"]
        else:
            self._taken_s.append(_busy(now) - self._busy_s)
        if steps == self._after + self._hold:
            exchanged = now["communication"] - self._first_exchange_s
            self.exchange_s = exchanged / self._hold
            self.own_s = max(0.0, statistics.fmean(self._taken_s) - self.exchange_s)
        self._busy_s = _busy(seconds())


def _busy(seconds: dict[Part, float]) -> float:
    return step_seconds(seconds) - seconds["wait"]
