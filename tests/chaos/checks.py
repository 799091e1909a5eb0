"""What must hold after any number of kills."""

import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch

from chaos import victims
from chaos.arena import EPOCHS, Arena
from orchestrator.data.sources import read_data
from orchestrator.run import read_events
from orchestrator.train.saving import checkpoint
from orchestrator.train.strategies.strategy import WEIGHTS_FILE, read_tensors


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
    return {path.name for path in Path("/dev/shm").iterdir()}


def leaks(arena: Arena, shm_before: set[str], *, patience_s: float = 90.0) -> list[str]:
    """Return what a run left behind: processes, shared memory, temporary folders, its lease.

    Ray's agents of a killed driver's cluster end by themselves, but may take more than 20 s.
    """
    deadline = time.monotonic() + patience_s
    while (left := victims.processes(arena.mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [f"process {pid} {title[:60]}" for pid, title in left.items()]
    # Other programs of this machine come and go; Ray's and torch's names are known.
    shm = {name for name in shared_memory() - shm_before if "plasma" in name or "torch" in name}
    found += [f"shared memory {name}" for name in sorted(shm)]
    found += [f"temporary folder {path.name}" for path in arena.temporary.glob("orchestrator-*")]
    return found + [f"lease {path.name}" for path in Path(arena.run).glob("*lease-*")]


def failures(arena: Arena) -> Counter[str]:
    """Return how many failures of each cause the run wrote down, over all its drivers."""
    events = read_events(arena.run)
    return Counter(event["cause"] for event in events if event["event"] == "failure")
