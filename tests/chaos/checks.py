"""What must hold after any number of kills."""

import dataclasses
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet as pq
import torch

from chaos import victims
from chaos.arena import EPOCHS, Arena
from chaos.battle import Kill
from orchestrator.data.sources import read_data
from orchestrator.run import read_events
from orchestrator.train.saving import checkpoint
from orchestrator.train.strategies.tensors import WEIGHTS_FILE, read_tensors

_SHARED_MEMORY = Path("/dev/shm")
# What lies in the folder of a run that ended, but for its checkpoints.
_USUAL = (
    "config.yaml",
    "events.jsonl",
    "metrics.parquet",
    "report.*",
    "report-*.png",
    "result.json",
    "samples/step-*/rank-*.parquet",
    "stacks/rank-*.txt",
    "tensorboard/*",
)
# One folder for each user, whatever is killed.
_TORCH_CACHE = "torchinductor_"
# A driver's first restart imports what later ones use again.
_WARM_UP_KILLS, _COMPARED_KILLS = 2, 3
JUDGED_KILLS = _WARM_UP_KILLS + 2 * _COMPARED_KILLS
"""Kills that a driver must live through before its memory is compared."""
_MAX_GROWTH = 0.05


def committed(arena: Arena) -> Counter[tuple[int, str]]:
    """Return how often each (epoch, id) was consumed by committed steps."""
    rows = pq.read_table(f"{arena.run}/samples").to_pylist()
    return Counter((row["epoch"], row["id"]) for row in rows)


def wrong_counts(arena: Arena) -> list[str]:
    """Return a sentence where an id was not consumed exactly once in each epoch."""
    counts = committed(arena)
    expected = EPOCHS * read_data(arena.config.data).splits["train"].samples
    more = sum(1 for count in counts.values() if count > 1)
    if (len(counts), more) == (expected, 0):
        return []
    return [f"{len(counts)} of {expected} samples were consumed, {more} of them more than once"]


def weights(arena: Arena) -> dict[str, torch.Tensor]:
    """Return the weights of the run's last checkpoint."""
    last = checkpoint.list_manifests(arena.run)[-1]
    uri = checkpoint.checkpoint_uri(arena.run, last.step)
    found: dict[str, torch.Tensor] = read_tensors(Path(uri) / WEIGHTS_FILE)
    return found


def differing_weights(arena: Arena, undisturbed: Arena) -> list[str]:
    """Return a sentence for each tensor that is not bit-equal to the undisturbed run's."""
    ours, theirs = weights(arena), weights(undisturbed)
    names = ours.keys() | theirs.keys()
    return [
        f"{name} differs from the undisturbed run's"
        for name in sorted(names)
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def shared_memory() -> set[str]:
    """Return the names of all shared-memory segments of this machine."""
    return {path.name for path in _SHARED_MEMORY.iterdir() if path.is_file()}


def leaks(arena: Arena, shm_before: set[str], *, patience_s: float = 90.0) -> list[str]:
    """Return what a run left behind: processes, shared memory, temporary files, its lease.

    Segments without a name, such as Ray's object store, live as long as a process that maps them.
    Ray's agents of a killed driver's cluster end by themselves, but may take more than 20 s.
    """
    deadline = time.monotonic() + patience_s
    while (left := victims.processes(arena.mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [f"process {pid} {title[:60]}" for pid, title in left.items()]
    new = shared_memory() - shm_before
    ours = new - victims.open_files(_SHARED_MEMORY, but=frozenset(left)) if new else new
    found += [f"shared memory {name}" for name in sorted(ours)]
    names = sorted(path.name for path in arena.temporary.iterdir())
    found += [f"temporary file or folder {n}" for n in names if not n.startswith(_TORCH_CACHE)]
    return found + strangers(Path(arena.run))


def strangers(run: Path) -> list[str]:
    """Return a sentence for each file of a run's folder that an undisturbed run would not leave."""
    manifests = {checkpoint.checkpoint_uri(str(run), m.step): m for m in _manifests(run)}
    saved = {f"{uri}/{record.name}" for uri, m in manifests.items() for record in m.files}
    saved |= {f"{uri}/{checkpoint.MANIFEST_FILE}" for uri in manifests}
    usual = [f"{uri}/rank-*.json" for uri in manifests] + [f"{run}/{name}" for name in _USUAL]
    paths = [str(path) for path in run.rglob("*") if path.is_file()]
    return [
        f"file {path.removeprefix(f'{run}/')} in the run's folder"
        for path in sorted(set(paths) - saved)
        if Path(path).name.startswith(".") or not any(fnmatch(path, name) for name in usual)
    ]


def _manifests(run: Path) -> list[checkpoint.Manifest]:
    return checkpoint.list_manifests(str(run)) if run.exists() else []


@dataclasses.dataclass(frozen=True)
class Life:
    """The memory of one driver over the kills that it lived through."""

    kills: int
    first_mb: float
    """Median of the first kills but for those of its warm-up."""
    last_mb: float

    @property
    def growth(self) -> float:
        """Growth as a share."""
        return self.last_mb / self.first_mb - 1

    def __str__(self) -> str:
        return (
            f"{self.first_mb:.0f} MB of its own, {self.last_mb:.0f} MB after {self.kills} kills "
            f"({self.growth:+.1%})"
        )


def lives(kills: Sequence[Kill]) -> list[Life]:
    """Return the memory of each driver that lived through enough kills to tell."""
    found = []
    for _, group in itertools.groupby(kills, key=lambda kill: kill.driver):
        sizes = [kill.driver_mb for kill in group][_WARM_UP_KILLS:]
        if len(sizes) >= 2 * _COMPARED_KILLS:
            first, last = sizes[:_COMPARED_KILLS], sizes[-_COMPARED_KILLS:]
            ends = statistics.median(first), statistics.median(last)
            found.append(Life(len(sizes) + _WARM_UP_KILLS, *ends))
    return found


def grown_drivers(kills: Sequence[Kill]) -> list[str]:
    """Return a sentence for each driver whose memory grew."""
    grown = [life for life in lives(kills) if life.growth > _MAX_GROWTH]
    return [f"the driver's memory grew: {life}" for life in grown]


def failures(arena: Arena) -> Counter[str]:
    """Return how many failures of each cause the run wrote down, over all its drivers."""
    events = read_events(arena.run)
    return Counter(event["cause"] for event in events if event["event"] == "failure")
