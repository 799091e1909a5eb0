"""Both sides: where the seconds between a command and its first step go. No torch, no Lightning."""

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass
class Startup:
    """A start's phases, one after the other, each ended by its mark.

    Times are of the wall clock: phases end in several processes, on a cluster on several nodes.
    """

    began: float
    """When the start began, in seconds since the epoch."""
    marks: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    """Each phase's name and end."""

    def mark(self, phase: str) -> None:
        """End a phase."""
        self.marks.append((phase, time.time()))

    def since(self, moment: float) -> "Startup":
        """Return the phases that ended after a moment, as a start that began there."""
        return Startup(moment, [mark for mark in self.marks if mark[1] > moment])

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; they add up to `total_s`."""
        found: dict[str, float] = {}
        last = self.began
        for phase, ended in self.marks:
            found[phase] = round(found.get(phase, 0.0) + ended - last, 3)
            last = ended
        return found

    @property
    def total_s(self) -> float:
        """Seconds from the beginning to the last mark."""
        return round(self.marks[-1][1] - self.began, 3) if self.marks else 0.0


def process_began() -> float:
    """Return when this process was started, in seconds since the epoch; now where Linux is not."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    # The 22nd field (proc(5)), counted after the name, which may hold spaces: ticks since boot.
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - up_s + ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large libraries inside the block: without looking for garbage, which they are not.

    Lightning brings 5,000 modules; looking through them again and again was 1.1 s of 4.9 s.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
            # What was imported stays: later looks for garbage need not pass over it.
            gc.freeze()
