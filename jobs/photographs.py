"""Photographs for the benchmarks: JPEGs with a photograph's spectrum, made and not downloaded."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

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
