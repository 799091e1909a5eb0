"""Saves without Lightning or Ray: workers are threads, the state is a few tensors of one step."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from orchestrator import storage
from orchestrator.config import CheckpointConfig
from orchestrator.data.batch import MicroBatch
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE
from orchestrator.train.saving import checkpoint, state
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.saving.commit import Committer
from orchestrator.train.saving.journal import Consumed, Metrics, Quarantine
from orchestrator.train.saving.rewinding import rewind
from orchestrator.train.saving.saver import Books
from orchestrator.train.strategies.tensors import (
    EXTRA_WEIGHTS,
    TRAINER_FILE,
    WEIGHTS_FILE,
    read_weights,
)

WORKERS = 2
BAD = {"id": "x", "uri": "u", "reason": "gone", "first_bytes": "", "epoch": 0}


def make_manifest(step: int, **changes: Any) -> Manifest:
    base = Manifest(
        step=step, position=step * 10, epoch=step // 4, metrics={}, done="", world_size=2,
        strategy="ddp", precision="32", config_digest="c", index_digest="i", stats={}, files=(),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def state_at(step: int, *, size: int = 64) -> state.State:
    """Return a state that says which step it is of."""
    weights = {"net.weight": torch.full((size,), float(step)), "net.bias": torch.arange(3) * step}
    optimizer = {"state": {0: {"exp_avg": torch.full((2, 2), float(step)), "step": step}}}
    rest = {"optimizers": [optimizer], "betas": (0.9, 0.999), EXTRA_WEIGHTS: {}}
    return {WEIGHTS_FILE: weights, TRAINER_FILE: rest}


class Meeting:
    """A gather between threads: what process groups do between workers."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return gather


@dataclasses.dataclass
class Worker:
    """One worker of a run: what it keeps, and how it saves."""

    run: str
    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    keep: int = 2
    max_age_s: float = 3600.0
    resumed: Path | None = None
    lines: list[str] = dataclasses.field(default_factory=list)
    check_lease: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.consumed = Consumed(self.rank, samples_per_epoch=1000, audit=True)
        self.metrics = Metrics(self.resumed)
        self.quarantined = Quarantine(self.resumed)
        books = Books(
            metrics=self.metrics,
            quarantine=self.quarantined,
            upload_logs=lambda: None,
            say=self.lines.append,
            keep=self.keep,
            watch=("val_loss", "min"),
        )
        self.committer = Committer(
            self.run,
            rank=self.rank,
            gather=self.gather,
            settings=CheckpointConfig(keep=self.keep, max_age_s=self.max_age_s),
            books=books if self.rank == 0 else None,
            totals={},
            check_lease=self.check_lease,
        )

    def consume(self, step: int, *, bad: list[dict[str, Any]] | None = None) -> None:
        """Take the one sample that is this worker's in a step, and log the step's loss."""
        position = (step - 1) * WORKERS + self.rank
        batch = MicroBatch(0, torch.empty(0), [position], [0], [0], [f"id-{position}"], bad or [])
        self.consumed.add(batch, step=step)
        self.metrics.add({"train_loss": 1 / step}, step=step, epoch=0, samples=step)

    def save(
        self,
        step: int,
        *,
        size: int = 64,
        must: bool = False,
        last: bool = False,
        **changes: Any,
    ) -> bool:
        """Save the state of a step; `changes` are to its manifest."""
        usual = {
            "position": step * WORKERS,
            "done": "max_epochs" if last else "",
            "stats": {"train_s": 1.0, "wait_s": 0.0},
        }
        return self.committer.save(
            make_manifest(step, **{**usual, **changes}),
            capture=lambda: state_at(step, size=size) if self.rank == 0 else {},
            consumed=self.consumed,
            must=must,
            last=last,
        )


def work(
    run: str,
    rank: int,
    gather: Callable[[Any], list[Any]],
    *,
    steps: int,
    every: int,
    start: int = 0,
    resumed: Path | None = None,
    keep: int = 2,
    **changes: Any,
) -> None:
    """Run one worker to the last step, saving every few steps, from where a checkpoint was."""
    worker = Worker(run, rank, gather, keep=keep, resumed=resumed)
    for step in range(start + 1, steps + 1):
        worker.consume(step, bad=[BAD] if step == 1 and rank == 1 else None)
        if step % every == 0 or step == steps:
            worker.save(step, must=True, last=step == steps, **changes)
    worker.committer.close(60)


def train(run: str, **options: Any) -> None:
    """Run two workers, as threads of this process, with the options of `work`."""
    meeting = Meeting(WORKERS)
    gathers = [meeting.of(rank) for rank in range(WORKERS)]
    others = [
        threading.Thread(target=work, args=(run, rank, gathers[rank]), kwargs=options)
        for rank in range(1, WORKERS)
    ]
    for thread in others:
        thread.start()
    work(run, 0, gathers[0], **options)
    for thread in others:
        thread.join()


def resume(run: str, folder: Path, *, steps: int, every: int, keep: int = 2) -> int:
    """Go on from the newest whole checkpoint, as a worker's start does; return its step."""
    there = checkpoint.survey(run)
    step = 0
    if there.manifests:
        manifest, _ = checkpoint.fetch_newest(run, there.manifests, folder)
        step = manifest.step
        weights = read_weights(folder)
        assert torch.equal(weights["net.weight"], state_at(step)[WEIGHTS_FILE]["net.weight"])
    rewind(run, step)
    if step < steps:
        resumed = folder if step else None
        train(run, steps=steps, every=every, start=step, resumed=resumed, keep=keep)
    return step


def assert_complete(run: str, *, steps: int) -> None:
    """Check that a run consumed every sample once, logged every step once, and left no rest."""
    counts: Counter[str] = Counter()
    for entry in storage.list_tree(f"{run}/samples"):
        with storage.open_input(f"{run}/samples/{entry.name}") as file:
            counts.update(pq.read_table(file)["id"].to_pylist())
    assert counts == {f"id-{i}": 1 for i in range(WORKERS * steps)}
    with storage.open_input(f"{run}/{METRICS_FILE}") as file:
        assert pq.read_table(file)["step"].to_pylist() == list(range(1, steps + 1))
    assert checkpoint.list_manifests(run)[-1].step == steps
    if checkpoint.list_manifests(run)[-1].stats["bad"]:
        with storage.open_input(f"{run}/{QUARANTINE_FILE}") as file:
            assert pq.read_table(file)["id"].to_pylist() == [BAD["id"]]
    left = [entry.name for entry in storage.list_tree(run) if entry.name.endswith(".tmp")]
    assert left == []
