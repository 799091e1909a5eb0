"""How long a checkpoint stops the step loop: written in line, or off the training thread.

    python jobs/bench_checkpoint.py --out FOLDER_OR_BUCKET [...] [--megabytes 100 500] [--turns 7]

For each size a model trains with AdamW (weights, and twice as much optimizer state) on the CPU. In
turns it saves in line (serialise, checksum, upload, manifest, then the next step) and the way
`orchestrator train` does; both write the same files, with the table of metrics that a run of 20,000
steps has logged. Prints medians and the range of the turns:
the pause of either way, the first pause (fresh buffers), by how much the steps beside the upload
were slower in sum (on a GPU nothing competes with them, here the writer needs their cores), and
what the table of metrics takes of that.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from orchestrator import storage
from orchestrator.config import CheckpointConfig
from orchestrator.run import METRICS_FILE
from orchestrator.train.saving import checkpoint, state
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.saving.commit import Committer
from orchestrator.train.saving.journal import Consumed, Metrics, Quarantine
from orchestrator.train.saving.saver import Books
from orchestrator.train.strategies.tensors import (
    EXTRA_WEIGHTS,
    OPTIMIZERS_FILE,
    TRAINER_FILE,
    WEIGHTS_FILE,
)

WIDTH = 1024
BATCH = 64
STEPS_BETWEEN = 3
# 20,000 steps, twenty values at each: 400,000 rows.
LOGGED_STEPS = 20_000
LOGGED = [f"metric_{i}" for i in range(20)]


class Training:
    """A model whose weights and AdamW state have a given size, and its step."""

    def __init__(self, megabytes: int) -> None:
        layers = max(1, round(megabytes * 1e6 / (3 * 4 * WIDTH**2)))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.batch = torch.randn(BATCH, WIDTH)
        self.step()

    def step(self) -> float:
        """Take a step; return its seconds."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - began

    def capture(self) -> state.State:
        """Return the state as a run's checkpoint holds it."""
        return {
            WEIGHTS_FILE: self.model.state_dict(),
            OPTIMIZERS_FILE: [self.optimizer.state_dict()],
            TRAINER_FILE: {EXTRA_WEIGHTS: {}},
        }


def log(metrics: Metrics, step: int) -> None:
    """Note the values of a step."""
    values = {name: (step + i) / 7 for i, name in enumerate(LOGGED)}
    metrics.add(values, step=step, epoch=0, samples=step * BATCH)


def logged() -> Metrics:
    """Return the metrics of a long run that goes on."""
    metrics = Metrics(None)
    for step in range(LOGGED_STEPS):
        log(metrics, step)
    return metrics.frozen()


def manifest(step: int) -> Manifest:
    """Return a manifest without files."""
    return Manifest(
        step=step, position=0, epoch=0, metrics={}, done="", world_size=1, strategy="ddp",
        precision="32", config_digest="", index_digest="", stats={}, files=(),
    )  # fmt: skip


class Bench:
    """Saves in turns below one URI."""

    def __init__(self, out: str, megabytes: int) -> None:
        self.run = storage.join(out, f"bench-{megabytes}")
        self.training = Training(megabytes)
        self.number = 0
        self.consumed = Consumed(0, 1, audit=False)
        self.metrics = logged()
        books = Books(
            metrics=self.metrics,
            quarantine=Quarantine(None),
            upload_logs=lambda: None,
            say=print,
            keep=1,
            watch=("val_loss", "min"),
        )
        self.committer = Committer(
            self.run,
            rank=0,
            gather=lambda mine: [mine],
            settings=CheckpointConfig(),
            books=books,
            totals={},
        )

    def in_line(self) -> float:
        """Save before the next step; return the pause in seconds."""
        began, point = time.perf_counter(), manifest(self.number)
        folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
        state.write_state(self.training.capture(), folder)
        table = self.metrics.encode()
        (folder / METRICS_FILE).write_bytes(table)
        storage.write_atomic(storage.join(self.run, METRICS_FILE), table)
        files = checkpoint.store_files(folder, checkpoint.checkpoint_uri(self.run, point.step))
        checkpoint.commit(self.run, Manifest(**{**vars(point), "files": tuple(files)}))
        shutil.rmtree(folder)
        pause = time.perf_counter() - began
        checkpoint.prune(self.run, keep=1, best=None)
        return pause

    def beside(self) -> tuple[float, float]:
        """Save off this thread; return the pause, and the seconds that steps were slower."""
        alone = statistics.median(self.training.step() for _ in range(STEPS_BETWEEN))
        began = time.perf_counter()
        begun = self.committer.save(
            manifest(self.number),
            capture=lambda: self.training.capture(),
            consumed=self.consumed,
        )
        pause = time.perf_counter() - began
        assert begun
        slowed = 0.0
        while checkpoint_is_missing(self.run, self.number):
            slowed += self.training.step() - alone
        return pause, slowed

    def table(self) -> tuple[float, float]:
        """Log a step; return the seconds in which the table is copied, and is encoded."""
        log(self.metrics, self.number)
        began = time.perf_counter()
        copied = self.metrics.frozen()
        between = time.perf_counter()
        copied.encode()
        return between - began, time.perf_counter() - between

    def turns(self, count: int) -> tuple[list[float], list[float], list[float]]:
        """Return the pauses in line, the pauses beside, and the slow-downs."""
        lines, pauses, slowdowns = [], [], []
        for turn in range(count + 1):
            self.number += 1
            lines.append(self.in_line())
            self.number += 1
            pause, slowed = self.beside()
            pauses.append(pause)
            slowdowns.append(slowed)
            if turn == 0:
                print(f"  first pause beside, into fresh buffers: {pause:.3f} s")
        return lines[1:], pauses[1:], slowdowns[1:]


def checkpoint_is_missing(run: str, step: int) -> bool:
    """Return whether a step's checkpoint is not committed yet."""
    location = storage.join(checkpoint.checkpoint_uri(run, step), checkpoint.MANIFEST_FILE)
    return not storage.exists(location)


def shown(seconds: Sequence[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def main(announce: Callable[[str], None] = print) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", nargs="+", required=True, help="folders or buckets to save below")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[100, 500])
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    for out in args.out:
        for megabytes in args.megabytes:
            announce(f"{megabytes} MB of state, {'bucket' if '://' in out else 'local disk'}")
            bench = Bench(storage.absolute(out), megabytes)
            lines, pauses, slowdowns = bench.turns(args.turns)
            share = statistics.median(pauses) / statistics.median(lines)
            announce(f"  pause in line {shown(lines)}, beside {shown(pauses)}: {share:.1%}")
            announce(f"  steps beside the writing slower by {shown(slowdowns)} in sum")
            copies, codes = zip(*(bench.table() for _ in range(args.turns)), strict=True)
            announce(f"  of metrics: pause {shown(copies)}, beside {shown(codes)}")
            bench.committer.close(60)
            storage.delete_folder(bench.run)


if __name__ == "__main__":
    main()
