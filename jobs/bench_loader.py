"""Images/s of our loader beside torch's DataLoader with Pillow over the same loose files.

    python jobs/bench_loader.py [--images 4000] [--repeats 5] [--size 224]

Makes photographs of about 100 kB, packs them, then reads them all in turns: first with the recipe
of the article (ImageFolder, torchvision's transforms, one DataLoader worker per CPU), then with
ours (one decode slot per CPU). Both end at float32 batches of 64 in this process, random resized
crop, flip and normalisation included. A pass counts from its first batch on: start-up is left out.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import ray
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from orchestrator import cluster
from orchestrator.config import Config, DataConfig, TrainConfig
from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.index import Index
from orchestrator.data.loader import Loader, Opened
from orchestrator.data.pack import pack
from orchestrator.data.source import Placement, blocks_of, plan_segment, split_segment

BATCH = 64
WIDTH, HEIGHT = 500, 375  # ImageNet's most common size
JPEG_QUALITY = 92
CLASSES = 10


def write_photograph(path: Path, seed: int) -> int:
    """Write a JPEG with a photograph's falling spectrum, some edges and grain; return its bytes."""
    random = np.random.default_rng(seed)
    picture = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.float32)
    for cells in (2, 6, 18, 54, 162):
        waves = random.normal(0, 70 / cells**0.5, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(waves, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre = (int(random.integers(WIDTH)), int(random.integers(HEIGHT)))
        colour = random.integers(0, 256, 3).tolist()
        cv2.circle(picture, centre, int(random.integers(8, 60)), colour, -1, cv2.LINE_AA)
    picture += random.normal(0, random.uniform(6, 18), (HEIGHT, WIDTH, 1)).astype(np.float32)
    pixels = picture.clip(0, 255).astype(np.uint8)
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return path.write_bytes(encoded.tobytes())


def write_photographs(root: Path, count: int) -> int:
    """Write an ImageFolder tree of `count` photographs; return their bytes."""
    for label in range(CLASSES):
        (root / str(label)).mkdir(parents=True)
    paths = [root / str(seed % CLASSES) / f"{seed:06d}.jpg" for seed in range(count)]
    with ProcessPoolExecutor() as pool:
        return sum(pool.map(write_photograph, paths, range(count), chunksize=64))


def article_batches(root: Path, size: int, num_workers: int) -> Iterator[torch.Tensor]:
    """Yield one epoch of image batches from loose files, as the article reads them."""
    data = DataConfig()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(str(root), transform),
        batch_size=BATCH,
        shuffle=True,
        num_workers=num_workers,
    )
    for image, _ in loader:
        yield image


def our_batches(index: Index, size: int, slots: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield one epoch of image batches from the packed folder, as a run's only worker gets them."""
    data = DataConfig(index=index.uri, image_size=size, global_batch=BATCH, max_micro_batch=BATCH)
    config = Config(seed=seed, data=data, train=TrainConfig(max_epochs=1))
    feed = feeds.training_feed(config, index, num_workers=1)
    placement = Placement.choose(
        requested=slots, cluster_cpus=ray.cluster_resources()["CPU"], worker_cpus=0
    )

    def open_segment(step: int) -> Opened:
        segment = plan_segment(feed, placement, step)
        (iterator,) = split_segment(feed, placement, segment)
        return Opened(blocks_of(iterator), segment.stop_step, segment.open_next_at)

    loader = Loader(
        feed.batching,
        rank=0,
        step=0,
        open_segment=open_segment,
        to_device=ToDevice(torch.device("cpu"), data),
        image_size=size,
    )
    for batch in loader.take(feed.batching.num_steps):
        yield batch["image"]
    # Else Ray Data ends the iteration when Python does, and starts a new Ray for that.
    loader.close()


def images_per_s(batches: Iterable[torch.Tensor], *, images: int) -> float:
    """Return the rate after the first batch; every image must arrive exactly once."""
    iterator = iter(batches)
    first = len(next(iterator))
    began = time.perf_counter()
    rest = sum(len(batch) for batch in iterator)
    elapsed = time.perf_counter() - began
    assert first + rest == images
    return rest / elapsed


def row(name: str, values: list[float], digits: int) -> str:
    """Return one line of the table: median and spread."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"| {name} | {median:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f} |"


def compare(root: Path, index: Index, options: argparse.Namespace) -> tuple[list[float], ...]:
    """Return images/s of the article's loader and of ours, pass by pass, after one warm-up each."""
    cpus = os.cpu_count() or 1
    theirs, ours = [], []
    for repeat in range(options.repeats + 1):
        batches = article_batches(root, options.size, cpus)
        theirs.append(images_per_s(batches, images=options.images))
        batches = our_batches(index, options.size, cpus, seed=repeat)
        ours.append(images_per_s(batches, images=options.images))
        note = " (warm-up)" if repeat == 0 else ""
        say(f"pass {repeat}{note}: article {theirs[-1]:,.0f}, ours {ours[-1]:,.0f} images/s")
    return theirs[1:], ours[1:]


def say(line: str) -> None:
    """Print progress where it does not mix with the table."""
    print(line, file=sys.stderr, flush=True)


def parse(flags: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=4000, help="photographs to make and read")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader that count")
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    options = parser.parse_args(flags)
    if options.images <= BATCH or options.repeats < 1 or options.size < 1:
        parser.error(f"--images must be above {BATCH}, --repeats and --size at least 1")
    return options


def main(flags: list[str]) -> int:
    """Make the data, read it with both loaders, print a Markdown table."""
    options = parse(flags)
    # What a training worker has; the article's loader normalises in its own processes.
    torch.set_num_threads(1)
    cluster.connect()
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder:
        root, packed = Path(folder) / "photographs", Path(folder) / "packed"
        total_bytes = write_photographs(root, options.images)
        index = pack(str(root), str(packed), val_fraction=0, say=say)
        theirs, ours = compare(root, index, options)
    ray.shutdown()
    for line in report(options, total_bytes, theirs, ours):
        print(line)
    return 0


def report(
    options: argparse.Namespace, total_bytes: int, theirs: list[float], ours: list[float]
) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    cpus, kilobytes = os.cpu_count(), total_bytes / options.images / 1000
    yield (
        f"{options.images:,} JPEGs of {WIDTH} x {HEIGHT} pixels, {kilobytes:.0f} kB on average; "
        f"batches of {BATCH} at {options.size} x {options.size}; {cpus} CPUs "
        f"({platform.machine()}), {options.repeats} passes each in turns; "
        f"{datetime.date.today().isoformat()}."
    )
    yield ""
    yield "| loader | median images/s | spread |"
    yield "|---|---:|---:|"
    yield row(f"torch DataLoader, Pillow, loose files, {cpus} workers", theirs, 0)
    yield row(f"orchestrator, packed, {cpus} decode slots", ours, 0)
    yield row(
        "ratio, pass by pass", [our / their for our, their in zip(ours, theirs, strict=True)], 2
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
