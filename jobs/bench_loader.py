"""Images/s of our loader beside torch's DataLoader with Pillow over the same loose files.

    python jobs/bench_loader.py [--images 8192] [--repeats 5] [--size 224]

Makes photographs of about 100 kB, packs them to a local folder and to an S3 server on loopback, and
reads them in turns: with the recipe of the article (ImageFolder, torchvision's transforms, one
DataLoader worker per CPU), with ours (one decode slot per CPU) to one and to two consumers, and
with ours from S3. All end at float32 batches of 64, random resized crop, flip and normalisation
included. A pass is one epoch; it counts from its first batch on: start-up is left out, and stands
in a column of its own. The last row is what the same CPUs decode when they do nothing else.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from baselines import BATCH, article_pass, decode_limit, timed
from findings import say, spread
from photographs import HEIGHT, WIDTH, write_photographs

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from s3 import environment, serve  # the S3 server that the tests use

from orchestrator import cluster
from orchestrator.config import Config, DataConfig, TrainConfig
from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.index import Index
from orchestrator.data.loader import Loader, Opened
from orchestrator.data.packing.pack import pack
from orchestrator.data.source import Placement, blocks_of, plan_segment, split_segment

MEMORY_POLL_S = 0.25


@dataclasses.dataclass(frozen=True)
class Pass:
    """One epoch read by one loader."""

    images_per_s: float
    first_batch_s: float
    peak_bytes: int
    """Largest memory of all its processes and their shared memory, above what was there before."""


@ray.remote(num_cpus=0)
class Consumer:
    """A training worker that does nothing with its batches."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def ready(self) -> None:
        """Return once the process stands."""

    def consume(self, feed: Feed, rank: int, iterator: Any) -> tuple[float, float, float, int]:
        """Read this worker's share of one epoch."""
        loader = Loader(
            feed.batching,
            rank=rank,
            step=0,
            open_segment=lambda step: Opened(
                blocks_of(iterator), feed.batching.num_steps, feed.batching.num_steps
            ),
            to_device=ToDevice(torch.device("cpu"), feed.reader.render.data),
            image_size=feed.reader.render.data.image_size,
        )
        found = timed(batch["image"] for batch in loader.take(feed.batching.num_steps))
        loader.close()
        return found


def our_pass(
    index: Index, size: int, slots: int, seed: int, consumers: list[Any]
) -> tuple[float, float, float, int]:
    """Read one epoch of the packed folder through Ray Data, as a run's workers do."""
    workers, began = len(consumers), time.time()
    data = DataConfig(
        index=index.uri, image_size=size, global_batch=BATCH * workers, max_micro_batch=BATCH
    )
    config = Config(seed=seed, data=data, train=TrainConfig(max_epochs=1))
    feed = feeds.training_feed(config, index, num_workers=workers)
    placement = Placement.choose(
        requested=slots, cluster_cpus=ray.cluster_resources()["CPU"], worker_cpus=0
    )
    segment = plan_segment(feed, placement, 0)
    assert segment.stop_step == feed.batching.num_steps
    iterators = split_segment(feed, placement, segment)
    parts = ray.get(
        [
            consumer.consume.remote(feed, rank, iterators[rank])
            for rank, consumer in enumerate(consumers)
        ]
    )
    _, first, end, images = zip(*parts, strict=True)
    return began, min(first), max(end), sum(images)


class PeakMemory:
    """Samples the memory of this process, its children and Ray's processes in a thread."""

    def __enter__(self) -> "PeakMemory":
        self._base = self._used()
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(MEMORY_POLL_S):
            self.bytes = max(self.bytes, self._used() - self._base)

    def _used(self) -> int:
        memory = psutil.virtual_memory()
        # Page cache is given back when it is wanted; shared memory is not.
        return int(memory.total - memory.available)


def measure(read: Callable[[], tuple[float, float, float, int]], *, images: int) -> Pass:
    """Run one pass; every image but the first batch must arrive exactly once."""
    with PeakMemory() as memory:
        began, first, end, rest = read()
    assert images - 2 * BATCH <= rest < images
    return Pass(rest / (end - first), first - began, memory.bytes)


def compare(
    root: Path, local: Index, remote: Index, options: argparse.Namespace
) -> dict[str, list[Pass]]:
    """Return the passes of every loader, in turns, after one warm-up each."""
    cpus = os.cpu_count() or 1
    consumers = [Consumer.remote() for _ in range(2)]
    ray.get([consumer.ready.remote() for consumer in consumers])
    passes: dict[str, list[Pass]] = {}
    for repeat in range(options.repeats + 1):
        turns: dict[str, Callable[[], tuple[float, float, float, int]]] = {
            f"torch DataLoader, Pillow, loose files, {cpus} workers": lambda: article_pass(
                root, options.size, cpus
            ),
            f"orchestrator, {cpus} decode slots": lambda seed=repeat: our_pass(
                local, options.size, cpus, seed, consumers[:1]
            ),
            "the same to two consumers": lambda seed=repeat: our_pass(
                local, options.size, cpus, seed, consumers
            ),
            "the same from S3 on loopback": lambda seed=repeat: our_pass(
                remote, options.size, cpus, seed, consumers[:1]
            ),
        }
        for name, read in turns.items():
            found = measure(read, images=options.images)
            say(f"pass {repeat} ({name}): {found.images_per_s:,.0f} images/s")
            passes.setdefault(name, []).append(found)
    return {name: found[1:] for name, found in passes.items()}


def parse(flags: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=8192, help="photographs to make and read")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader that count")
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    options = parser.parse_args(flags)
    if options.images < 4 * BATCH or options.repeats < 1 or options.size < 1:
        parser.error(f"--images must be at least {4 * BATCH}, --repeats and --size at least 1")
    return options


def main(flags: list[str]) -> int:
    """Make the data, read it with all loaders, print a Markdown table."""
    options = parse(flags)
    # What a training worker has; the article's loader normalises in its own processes.
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder,
        serve() as server,
        environment(server.env),
    ):
        cluster.connect()
        root = Path(folder) / "photographs"
        total_bytes = write_photographs(root, options.images)
        local = pack(str(root), str(Path(folder) / "packed"), val_fraction=0, say=say)
        bucket = server.make_bucket("bench")
        remote = pack(str(root), f"{bucket}/packed", val_fraction=0, say=say)
        passes = compare(root, local, remote, options)
        limit = decode_limit(local, options.size, os.cpu_count() or 1)
        ray.shutdown()
    for line in report(options, total_bytes, passes, limit):
        print(line)
    return 0


def report(
    options: argparse.Namespace, total_bytes: int, passes: dict[str, list[Pass]], limit: float
) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    kilobytes = total_bytes / options.images / 1000
    yield (
        f"{options.images:,} JPEGs of {WIDTH} x {HEIGHT} pixels, {kilobytes:.0f} kB on average; "
        f"batches of {BATCH} at {options.size} x {options.size}; {os.cpu_count()} CPUs "
        f"({platform.machine()}), {options.repeats} passes each in turns; "
        f"{datetime.date.today().isoformat()}. Median and spread."
    )
    yield ""
    yield "| loader | images/s | x the first | first batch, s | peak memory, GB |"
    yield "|---|---|---|---|---|"
    base = next(iter(passes.values()))
    for name, found in passes.items():
        ratios = [p.images_per_s / q.images_per_s for p, q in zip(found, base, strict=True)]
        yield (
            f"| {name} | {spread([p.images_per_s for p in found], 0)} | {spread(ratios, 2)} "
            f"| {spread([p.first_batch_s for p in found], 1)} "
            f"| {max(p.peak_bytes for p in found) / 1e9:.1f} |"
        )
    yield f"| {os.cpu_count()} processes that only decode | {limit:,.0f} | | | |"
    ours, s3 = list(passes.values())[1], list(passes.values())[3]
    share = [p.images_per_s / limit for p in ours]
    loss = [p.images_per_s / q.images_per_s for p, q in zip(s3, ours, strict=True)]
    yield ""
    yield f"Share of the decode limit: {spread(share, 2)}. S3 over local: {spread(loss, 2)}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
