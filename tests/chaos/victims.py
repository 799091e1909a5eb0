"""Which processes belong to a run, and what each of them is."""

import contextlib
import os
import random
import signal
from pathlib import Path

# How Ray names its processes. Idle ones are readers that wait for their next task.
_TITLES = {
    "worker": ("ray::RayTrainWorker",),
    "stopped": ("ray::RayTrainWorker",),
    "loader": ("ray::Read", "ray::SplitCoordinator", "ray::IDLE"),
    "coordinator": ("ray::SplitCoordinator",),
    "controller": ("ray::TrainController",),
}
TARGETS = ("worker", "stopped", "loader", "coordinator", "controller", "driver", "node")


def processes(mark: str) -> dict[int, str]:
    """Return the titles, by process id, of all that live and carry a mark in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            if mark.encode() in (folder / "environ").read_bytes():
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = title.decode(errors="replace").strip()
    return found


def choose(target: str, mark: str, rng: random.Random) -> int | None:
    """Return the id of a random process that is such a target, or None where there is none."""
    alive = processes(mark)
    fits = sorted(pid for pid, title in alive.items() if title.startswith(_TITLES[target]))
    return rng.choice(fits) if fits else None


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send SIGKILL, or another signal, to one process; return whether it was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def resident_mb(pid: int) -> float:
    """Return a process's resident memory in MB, 0 where it has ended."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0
