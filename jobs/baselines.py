"""What the loader's benchmark compares with: the article's recipe, and decoding alone."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from orchestrator.config import Config, DataConfig
from orchestrator.data import feeds, fetch
from orchestrator.data.index import Index, read_index

BATCH = 64


def article_pass(root: Path, size: int, num_workers: int) -> tuple[float, float, float, int]:
    """Read loose files as the article does; return (start, first batch, end, images after it)."""
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
    return timed(image for image, _ in loader)


def timed(batches: Iterator[torch.Tensor]) -> tuple[float, float, float, int]:
    """Consume batches; return the times of the start, the first and the last, and their images."""
    began = time.time()
    len(next(batches))
    first = time.time()
    images = sum(len(batch) for batch in batches)
    return began, first, time.time(), images


def decode_alone(index_uri: str, size: int, seed: int) -> tuple[float, int]:
    """Decode an epoch's first samples from memory; return (seconds, images)."""
    config = Config(
        seed=seed, data=DataConfig(index=index_uri, image_size=size, global_batch=BATCH)
    )
    feed = feeds.training_feed(config, read_index(index_uri), num_workers=1)
    work = next(feed.works(step=0, stop_step=feed.batching.num_steps))
    samples = list(fetch.samples(work, feed.reader.layout, fetch.Cost))
    out = torch.empty(size, size, 3, dtype=torch.uint8).numpy()
    began = time.perf_counter()
    for sample in samples:
        feed.reader.render.decode(sample, out)
    return time.perf_counter() - began, len(samples)


def decode_limit(index: Index, size: int, processes: int) -> float:
    """Return images/s of processes that decode and do nothing else."""
    everywhere = ([index.uri] * processes, [size] * processes, range(processes))
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(decode_alone, *everywhere))
    return sum(images / seconds for seconds, images in parts)
