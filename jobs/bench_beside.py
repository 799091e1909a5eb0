"""What validation costs training: left out, in line, and in a process of its own beside it.

    python jobs/bench_beside.py [--repeats 3] [--steps 160] [--validations 4]

Sides in turns, each `orchestrator train` on a Ray cluster of its own with a CPU to spare. A step
and a validation batch sleep, as a host does while its GPU computes: what is compared is whether
steps wait for validation, not how two processes share these cores. A side's time is that from its
first step's end to its last one's; the longest gap is the longest time between two steps' ends.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from findings import ORCHESTRATOR, say, spread
from photographs import write_photographs
from torch import nn
from torch.nn import functional

from orchestrator.run import read_events

BATCH, VALIDATION_IMAGES = 8, 64
STEP_S, VALIDATION_BATCH_S = 0.1, 0.5
NONE, IN_LINE, BESIDE = "no validation", "in line", "beside"
SIDES = (NONE, IN_LINE, BESIDE)


class Sleeps(pl.LightningModule):
    """Sleeps as long as a device would compute; notes when each step ended."""

    def __init__(self, notes: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
        self.notes = notes
        self.ended: list[float] = []

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return functional.cross_entropy(self.net(batch["image"]), batch["label"])

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        """Train on one micro-batch."""
        time.sleep(STEP_S)
        return self._loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ended.append(time.monotonic())

    def on_train_end(self) -> None:
        """Write down the times."""
        Path(self.notes).write_text(json.dumps(self.ended))

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Validate one batch."""
        time.sleep(VALIDATION_BATCH_S)
        self.log("val_loss", self._loss(batch), batch_size=len(batch["id"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def turn(side: str, root: Path, options: argparse.Namespace, number: int) -> dict[str, float]:
    """Train once with one side; return what training took."""
    name = f"{side.replace(' ', '-')}-{number}"
    notes = root / f"{name}.json"
    config: dict[str, Any] = {
        "name": name,
        "storage_path": str(root / "runs"),
        "data": {
            "index": str(root / ("bare" if side == NONE else "packed")),
            "global_batch": BATCH,
            "eval_batch": BATCH,
            "image_size": 32,
            "decode_slots": 1,
        },
        "model": {"class_path": "bench_beside.Sleeps", "init_args": {"notes": str(notes)}},
        "train": {
            "max_epochs": 1,
            "strategy": "ddp",
            "precision": "32",
            "early_stopping": None,
            "checkpoint": {"every_steps": None, "every_seconds": None},
        },
    }
    if side != NONE:
        every = options.steps * BATCH // options.validations
        apart = {"cpus": 1} if side == BESIDE else None
        config["train"]["validate"] = {"every_samples": every, "beside": apart}
    path = root / f"{name}.config.json"
    path.write_text(json.dumps(config))
    start = (
        "import sys, ray; ray.init(address='local', num_cpus=4, include_dashboard=False, "
        "log_to_driver=False); from orchestrator.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", start, "train", "--config", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ended = json.loads(notes.read_text())
    gaps = [b - a for a, b in itertools.pairwise(ended)]
    events = [event["event"] for event in read_events(str(root / "runs" / name))]
    found = {
        "train_s": ended[-1] - ended[0],
        "step_s": statistics.median(gaps),
        "longest_s": max(gaps),
        "skipped": float(events.count("validation_skipped")),
    }
    say(f"pass {number} ({side}): {found}")
    return found


def report(passes: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    each_s = VALIDATION_BATCH_S * VALIDATION_IMAGES / BATCH
    yield (
        f"{options.steps} steps of {STEP_S:g} s, {options.validations} validations of {each_s:g} "
        f"s; {os.cpu_count()} CPUs ({platform.machine()}), {options.repeats} passes each in turns; "
        f"{datetime.date.today().isoformat()}. Median and spread."
    )
    yield ""
    yield "| side | training, s | ratio to none | a step, s | longest gap, s | skipped |"
    yield "|---|---|---|---|---|---|"
    none = [found["train_s"] for found in passes[NONE]]
    for side, found in passes.items():
        took = [each["train_s"] for each in found]
        ratios = [mine / theirs for mine, theirs in zip(took, none, strict=True)]
        steps, gaps = ([each[key] for each in found] for key in ("step_s", "longest_s"))
        skipped = sum(each["skipped"] for each in found)
        yield (
            f"| {side} | {spread(took, 1)} | {spread(ratios, 2)} | {spread(steps, 3)} | "
            f"{spread(gaps, 2)} | {skipped:g} |"
        )


def main(flags: list[str]) -> int:
    """Make the data, train with all sides in turns, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="passes of each side")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a pass")
    parser.add_argument("--validations", type=int, default=4, help="validations of a pass")
    options = parser.parse_args(flags)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder:
        root = Path(folder)
        train_images = options.steps * BATCH
        for name, held in (("packed", VALIDATION_IMAGES), ("bare", 0)):
            write_photographs(root / f"{name}-source", train_images + held)
            pack(root, name, held / (train_images + held))
        passes: dict[str, list[dict[str, float]]] = {}
        for number in range(options.repeats):
            for side in SIDES:
                passes.setdefault(side, []).append(turn(side, root, options, number))
    for line in report(passes, options):
        print(line)
    return 0


def pack(root: Path, name: str, val_fraction: float) -> None:
    """Pack photographs, with or without a validation split."""
    places = ["--source", str(root / f"{name}-source"), "--out", str(root / name)]
    command = [*ORCHESTRATOR, "pack", *places, "--val-fraction", str(val_fraction)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
