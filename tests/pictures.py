"""Crops of the two photographs that scikit-learn carries, and micro-batches of them."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from orchestrator.data.batch import MicroBatch


@functools.cache
def photographs(count: int, side: int) -> torch.Tensor:
    """Return uint8 (count, side, side, 3), every one another part of a photograph."""
    random, images = np.random.default_rng(0), load_sample_images().images
    places = random.integers(0, (427 - side, 640 - side), (count, 2)).tolist()
    crops = [images[i % 2][y : y + side, x : x + side] for i, (y, x) in enumerate(places)]
    return torch.from_numpy(np.stack(crops))


def micro_batch(rows: Sequence[int], *, side: int = 32, epoch: int = 0) -> MicroBatch:
    """Return these of 64 samples; sample i has the id "i" and, of ten classes, i % 10."""
    return MicroBatch(
        micro=0,
        pixels=photographs(64, side)[list(rows)],
        positions=list(rows),
        epochs=[epoch] * len(rows),
        labels=[i % 10 for i in rows],
        ids=[str(i) for i in rows],
        bad=[],
    )
