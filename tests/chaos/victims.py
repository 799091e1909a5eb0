"""Which processes belong to a run, and what each of them is."""

import contextlib
import os
import random
import signal
from collections.abc import Collection
from pathlib import Path

# How Ray names its processes. Idle ones are readers that wait for their next task.
_TITLES = {
    "worker": ("ray::RayTrainWorker",),
    "stopped": ("ray::RayTrainWorker",),
    "loader": ("ray::Read", "ray::SplitCoordinator", "ray::IDLE"),
    "coordinator": ("ray::SplitCoordinator",),
    "controller": ("ray::TrainController",),
}
_SIGNALS = {"stopped": signal.SIGSTOP}
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


def open_files(folder: Path, *, but: Collection[int]) -> set[str]:
    """Return the names of files directly below a folder that processes hold, some left out."""
    start, found = f"{folder}/", set()
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) not in but:
            with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
                lines = (process / "maps").read_text().splitlines()
                found |= {line.partition(start)[2] for line in lines if start in line}
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                found |= {link.removeprefix(start) for link in links if link.startswith(start)}
    return found


def choose(target: str, mark: str, rng: random.Random) -> int | None:
    """Return the id of a random process that is such a target, or None where there is none."""
    alive = processes(mark)
    fits = sorted(pid for pid, title in alive.items() if title.startswith(_TITLES[target]))
    return rng.choice(fits) if fits else None


def signal_of(target: str) -> signal.Signals:
    """Return what ends a target, or stops it."""
    return _SIGNALS.get(target, signal.SIGKILL)


def kill(pid: int, number: signal.Signals) -> bool:
    """Send a signal to one process; return whether it was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def own_mb(pid: int) -> float:
    """Return a process's resident memory in MB but for files and shared memory; 0: it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0
