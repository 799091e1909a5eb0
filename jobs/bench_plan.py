"""What planning costs for 10^6 to 10^10 images: time, memory, and how well they are shuffled.

    python jobs/bench_plan.py [--images 1e6 1e7 1e8 1e9 1e10] [--repeats 3] [--mix]
    python jobs/bench_plan.py --order [--images 4e6]

Writes real indexes (shards of about 4096 images in chunks of 64, each shard's last chunk shorter)
without any images. Every figure is of a fresh process: a coordinator, which reads the index and
plans read tasks, and a reader, which gets them. Memory is what the process grew by above its
imports, at its peak; CPU time is in parentheses, since other processes may share the machine.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from findings import say

from orchestrator.config import Config, DataConfig, MixPart, TrainConfig
from orchestrator.data import feeds, plan
from orchestrator.data.index import Shard, write_index
from orchestrator.data.quality import Quality, epoch_order, measure
from orchestrator.data.sources import read_data
from orchestrator.data.stream import ChunkSizes, Stream

SHARD_CHUNKS, CHUNK_ROWS = 64, 64
WORKERS, GLOBAL_BATCH, EPOCHS = 64, 8192, 100
STEPS = 50
# Of one image, for the cost of a window in memory.
IMAGE_BYTES = 100_000


def write_synthetic(uri: str, images: int) -> None:
    """Write an index of about that many images whose shards do not exist."""

    def shards() -> Iterator[Shard]:
        for i in range(max(1, round(images / SHARD_CHUNKS / CHUNK_ROWS))):
            rows = (*[CHUNK_ROWS] * (SHARD_CHUNKS - 1), 1 + 37 * i % CHUNK_ROWS)
            content = i * 0x9E3779B97F4A7C15 % 2**64
            path = f"train/{i % 4096:03x}/{i:09d}.parquet"
            yield Shard("train", path, sum(rows), 400_000_000 + i, content, rows)

    names = [f"class-{i}" for i in range(1000)]
    write_index(uri, classes=names, shards=shards(), settings={}, quarantined=0)


def config_of(uris: list[str]) -> Config:
    """Return the config of a run on one index, or on a mix of several."""
    one = uris[0] if len(uris) == 1 else ""
    parts = tuple(MixPart(index=uri, weight=i + 1) for i, uri in enumerate(uris))
    data = DataConfig(index=one, mix=() if one else parts, global_batch=GLOBAL_BATCH)
    return Config(data=data, train=TrainConfig(max_epochs=EPOCHS))


class Meter:
    """Wall and CPU seconds and peak memory of this process since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        self._base = _status_mb("VmRSS")
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """Return wall and CPU seconds."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu

    def megabytes(self) -> dict[str, float]:
        """Return the peak above the imports, and in all."""
        peak = _status_mb("VmHWM")
        return {"grown_mb": peak - self._base, "total_mb": peak}


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def coordinate(uris: list[str], share: float) -> dict[str, Any]:
    """Do what the process that plans does after `share` epochs: one micro-batch, some steps."""
    meter = Meter()
    config = config_of(uris)
    index = read_data(config.data)
    feed = feeds.training_feed(config, index, num_workers=WORKERS)
    step = int(feed.samples_per_epoch * share / GLOBAL_BATCH)
    works = feed.works(step=step, stop_step=feed.batching.num_steps)
    work = next(works)
    next(plan.rounds(work.task, feed.batching))
    wall, cpu = meter.seconds()
    target = (step + STEPS) * GLOBAL_BATCH
    began = time.process_time()
    last = next(w for w in itertools.chain([work], works) if w.task.stop >= target)
    per_step = (time.process_time() - began) / STEPS
    path = Path(uris[0]).with_suffix(".work")
    path.write_bytes(pickle.dumps((feed.reader, [work, last])))
    return {
        "images": index.splits["train"].samples,
        "first_s": wall,
        "first_cpu_s": cpu,
        "step_ms": 1000 * per_step,
        "task_kb": len(pickle.dumps(work)) / 1000,
        "task_samples": work.task.stop - work.task.start,
        **meter.megabytes(),
    }


def read(uris: list[str], share: float) -> dict[str, Any]:
    """Do what a reading process does, but for the images: find each sample of its tasks."""
    meter = Meter()
    read_data(config_of(uris).data)
    reader, works = pickle.loads(Path(uris[0]).with_suffix(".work").read_bytes())
    samples = 0
    for work in works:
        samples += sum(len(pieces) for pieces in plan.rounds(work.task, reader.batching))
        for window, refs in zip(work.task.windows, work.chunks, strict=True):
            section, _ = window.samples(window.start, window.stop)
            assert int(section.max()) == len(refs) - 1
    return meter.megabytes()


def measured(role: str, uris: list[str], share: float, repeats: int) -> dict[str, float]:
    """Return the medians over fresh processes."""
    command = [sys.executable, __file__, "--role", role, "--share", str(share), "--uris", *uris]
    runs = [
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        for _ in range(repeats)
    ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def plan_rows(options: argparse.Namespace) -> Iterator[str]:
    """Yield the Markdown table of what planning costs."""
    yield "| images | first batch (CPU), s | resumed at 99 % (CPU), s | CPU a step, ms |" + (
        " coordinator, MB | reader, MB | one task, kB |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for images in options.images:
        with tempfile.TemporaryDirectory(prefix="orchestrator-plan-") as folder:
            count = 3 if options.mix else 1
            uris = [f"{folder}/index-{i}" for i in range(count)]
            began = time.process_time()
            for uri in uris:
                write_synthetic(uri, int(images) // count)
            say(f"wrote {images:.0e} in {time.process_time() - began:.1f} CPU s")
            start = measured("coordinate", uris, 0, options.repeats)
            late = measured("coordinate", uris, EPOCHS - 2 + 0.99, options.repeats)
            # Plans a few steps on either side of an epoch's end, where it holds two epochs' orders.
            end = measured("coordinate", uris, 1 - 20 * GLOBAL_BATCH / images, options.repeats)
            reader = measured("read", uris, 0, options.repeats)
        yield (
            f"| {start['images']:,.0f} | {start['first_s']:.2f} ({start['first_cpu_s']:.2f}) "
            f"| {late['first_s']:.2f} ({late['first_cpu_s']:.2f}) | {start['step_ms']:.2f} "
            f"| {end['grown_mb']:,.0f} ({end['total_mb']:,.0f}) "
            f"| {reader['grown_mb']:,.1f} ({reader['total_mb']:,.0f}) "
            f"| {start['task_kb']:.1f} for {start['task_samples']:,.0f} samples |"
        )


def order_rows(options: argparse.Namespace) -> Iterator[str]:
    """Yield the Markdown table of how well an order is shuffled, by window."""
    chunks = int(options.images[0]) // CHUNK_ROWS
    sizes = ChunkSizes.from_rows([CHUNK_ROWS] * chunks)
    firsts = np.arange(chunks) * CHUNK_ROWS
    shards = np.arange(sizes.num_samples) // (CHUNK_ROWS * SHARD_CHUNKS)
    yield f"| window_chunks | MB of images held | shards in a batch of {GLOBAL_BATCH // 32} |" + (
        " correlation | displacement | neighbours |"
    )
    yield "|---:|---:|---:|---:|---:|---:|"
    for window in (1, 4, 16, 64, 256, 1024):
        stream = Stream(sizes, digest="order", seed=0, window_chunks=window)
        places = epoch_order(stream, firsts)
        # A reader holds one window and fetches the next.
        held = 2 * window * CHUNK_ROWS * IMAGE_BYTES / 1e6
        yield _quality_row(f"{window:,} | {held:,.0f}", measure(places, shards, batch=256))
    full = np.random.default_rng(0).permutation(sizes.num_samples)
    yield _quality_row("full shuffle | all", measure(full, shards, batch=256))


def _quality_row(name: str, found: Quality) -> str:
    values = dataclasses.asdict(found)
    return (
        f"| {name} | {values['shards_per_batch']:.1f} | {values['correlation']:.4f} "
        f"| {values['displacement']:.4f} | {values['neighbours']:.6f} |"
    )


def parse(flags: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=float, nargs="+", help="sizes of the data sets")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each figure")
    parser.add_argument("--mix", action="store_true", help="a mix of three indexes, by weight")
    parser.add_argument("--order", action="store_true", help="print how well orders are shuffled")
    parser.add_argument("--role", choices=["coordinate", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--uris", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(flags)
    options.images = options.images or ([4e6] if options.order else [1e6, 1e7, 1e8, 1e9, 1e10])
    if options.repeats < 1 or min(options.images) < 1e5:
        parser.error("--repeats must be at least 1 and --images at least 1e5")
    return options


def main(flags: list[str]) -> int:
    """Measure and print a Markdown table."""
    options = parse(flags)
    if options.role:
        role = coordinate if options.role == "coordinate" else read
        print(json.dumps(role(options.uris, options.share)))
        return 0
    print(
        f"{platform.machine()}, Python {platform.python_version()}, "
        f"{datetime.date.today().isoformat()}.\n"
    )
    if not options.order:
        print(
            f"{WORKERS} workers, global_batch {GLOBAL_BATCH}; medians of {options.repeats} fresh "
            "processes; memory above the imports (and in all).\n"
        )
    for line in order_rows(options) if options.order else plan_rows(options):
        print(line, flush=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    say(f"CPU of the measured processes: {usage.ru_utime + usage.ru_stime:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
