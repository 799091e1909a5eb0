"""Images/s of `orchestrator train` beside a plain Lightning Trainer, end to end, on real JPEGs.

    python jobs/bench_train.py [--images 8192] [--repeats 3] [--size 112]

Sides in turns, each in a process of its own: Lightning with torch's DataLoader (ImageFolder,
Pillow, torchvision's random resized crop and flip, one worker per CPU), training on as many threads
as CPUs and on one; ours on the same images packed; and the same Lightning loop fed from memory
(batches made once), on as many threads. All train the same ImageClassifier with the same batch size
in the same precision. Rates are those of the epoch's second half: what was decoded while a side
started (ours holds up to 64 MB of crops, some 1,800 at 112 pixels) is used up by then. The wall
time beside them has everything in it.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from findings import ORCHESTRATOR, say, spread
from photographs import CLASSES, write_photographs

BATCH = 64
DATALOADER, ON_ONE = "Lightning, DataLoader", "Lightning, DataLoader, training on 1 thread"
OURS, FROM_MEMORY = "orchestrator", "Lightning from memory"
ONE_FROM_MEMORY = "Lightning from memory, training on 1 thread"
SIDES = (DATALOADER, ON_ONE, OURS, FROM_MEMORY, ONE_FROM_MEMORY)


def run_lightning(side: str, root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train one epoch with Lightning alone; called in a process of its own."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from orchestrator.config import DataConfig
    from orchestrator.train.module import ImageClassifier

    data = DataConfig()
    marks: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    def as_batch(pairs: list[tuple[Any, int]]) -> dict[str, Any]:
        images, labels = zip(*pairs, strict=True)
        stacked = torch.stack(images).contiguous(memory_format=torch.channels_last)
        return {"image": stacked, "label": torch.tensor(labels), "id": [""] * len(labels)}

    class Cached:
        def __init__(self, batches: list[dict[str, Any]], count: int) -> None:
            self.batches, self.count = batches, count

        def __len__(self) -> int:
            return self.count

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for number in range(self.count):
                yield self.batches[number % len(self.batches)]

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    pl.seed_everything(0, verbose=False)
    images = datasets.ImageFolder(str(root / "photographs"), transform)
    loader: Any = DataLoader(
        images,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        collate_fn=as_batch,
    )
    if side in (FROM_MEMORY, ONE_FROM_MEMORY):
        made = [as_batch([images[BATCH * n + i] for i in range(BATCH)]) for n in range(4)]
        loader = Cached(made, options.images // BATCH)
    # Beside the DataLoader's processes more threads are not always faster: both are measured.
    torch.set_num_threads(1 if side in (ON_ONE, ONE_FROM_MEMORY) else os.cpu_count() or 1)
    module = ImageClassifier(arch=options.arch, num_classes=CLASSES)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if hasattr(module, "total_steps"):
        module.total_steps = options.images // BATCH
    trainer.fit(module, loader)
    return {"images_per_s": steady(marks), "wall_s": 0.0}


def steady(marks: list[float]) -> float:
    """Return images/s of the second half of the steps."""
    skipped = len(marks) // 2
    return BATCH * (len(marks) - 1 - skipped) / (marks[-1] - marks[skipped])


def run_ours(root: Path, options: argparse.Namespace, name: str) -> dict[str, float]:
    """Train one epoch with `orchestrator train`, as users call it."""
    settings: dict[str, Any] = {
        "name": name,
        "storage_path": root / "runs",
        "data.index": root / "packed",
        "data.global_batch": BATCH,
        "data.image_size": options.size,
        "model.init_args.arch": options.arch,
        "train.max_epochs": 1,
        "train.early_stopping": "null",
        "train.precision": "32",
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [*ORCHESTRATOR, "train", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"images_per_s": rate_of(root / "runs" / name), "wall_s": 0.0}


def rate_of(run: Path) -> float:
    """Return steady images/s of a run by the times in its metrics, every fifth step."""
    import pyarrow.parquet as pq

    (last,) = sorted((run / "checkpoints").glob("step-*/metrics.parquet"))[-1:]
    rows = [row for row in pq.read_table(last).to_pylist() if row["name"] == "train_loss"]
    first = next(row for row in rows if row["step"] > rows[-1]["step"] // 2)
    samples: float = rows[-1]["samples"] - first["samples"]
    return samples / (rows[-1]["time"] - first["time"])


def turn(side: str, root: Path, options: argparse.Namespace, number: int) -> dict[str, float]:
    """Run one side once, in a process of its own."""
    began = time.perf_counter()
    if side == OURS:
        found = run_ours(root, options, f"pass-{number}")
    else:
        flags = ["--images", str(options.images), "--size", str(options.size)]
        flags += ["--arch", options.arch]
        command = [sys.executable, __file__, *flags, "--side", side, "--root", str(root)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
    found["wall_s"] = time.perf_counter() - began
    say(f"pass {number} ({side}): {found['images_per_s']:,.0f} images/s, {found['wall_s']:.0f} s")
    return found


def report(passes: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield (
        f"{options.images:,} photographs, {options.arch} at {options.size} x {options.size}, "
        f"batches of {BATCH}, fp32; {os.cpu_count()} CPUs ({platform.machine()}), "
        f"{options.repeats} passes each in turns; {datetime.date.today().isoformat()}. Median and "
        "spread; rates of the second half."
    )
    yield ""
    yield "| side | images/s | orchestrator / it | wall time with start-up, s |"
    yield "|---|---|---|---|"
    ours = [found["images_per_s"] for found in passes[OURS]]
    for side, found in passes.items():
        rates = [each["images_per_s"] for each in found]
        ratios = [mine / theirs for mine, theirs in zip(ours, rates, strict=True)]
        walls = [each["wall_s"] for each in found]
        yield f"| {side} | {spread(rates, 0)} | {spread(ratios, 2)} | {spread(walls, 0)} |"


def main(flags: list[str]) -> int:
    """Make the data, train with all sides in turns, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8192, help="photographs to make and train on")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each side")
    parser.add_argument("--size", type=int, default=112, help="side of the crops in pixels")
    parser.add_argument("--arch", default="tiny_resnet", help="network of ImageClassifier")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--root", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(flags)
    if options.side:
        print(json.dumps(run_lightning(options.side, Path(options.root), options)))
        return 0
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder:
        root = Path(folder)
        write_photographs(root / "photographs", options.images)
        source, out = str(root / "photographs"), str(root / "packed")
        pack = ["pack", "--source", source, "--out", out, "--val-fraction", "0"]
        subprocess.run([*ORCHESTRATOR, *pack], check=True, stdout=subprocess.DEVNULL)
        passes: dict[str, list[dict[str, float]]] = {}
        for number in range(options.repeats):
            for side in SIDES:
                passes.setdefault(side, []).append(turn(side, root, options, number))
    for line in report(passes, options):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
