"""Crops depend on their key alone, and are distributed as torchvision's."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from orchestrator.data.images.crop import Crop, center_crop, random_crop
from orchestrator.data.stream import hash_key

SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)


def crop(key: int, width: int = 640, height: int = 480, flip: float = 0.5) -> Crop:
    return random_crop(width, height, scale=SCALE, ratio=RATIO, flip=flip, key=key)


def test_a_key_gives_the_same_crop_for_ever() -> None:
    # Written down once: another NumPy, machine or version of ours must not change a run.
    assert crop(0) == Crop(298, 4, 334, 439, False)
    assert crop(2**64 - 1) == Crop(16, 26, 577, 447, False)
    assert crop(hash_key("augment", 0, 1, "7/0123.png")) == Crop(73, 28, 496, 428, True)
    assert len({crop(hash_key(i)) for i in range(500)}) == 500


def test_crops_lie_inside_the_image_and_within_scale_and_ratio() -> None:
    crops = [crop(hash_key("inside", i)) for i in range(4000)]
    shares = np.array([c.width * c.height / (640 * 480) for c in crops])
    ratios = np.array([c.width / c.height for c in crops])
    assert all(0 <= c.left <= 640 - c.width and 0 <= c.top <= 480 - c.height for c in crops)
    assert shares.min() >= SCALE[0] * 0.99
    assert shares.max() <= 1
    assert ratios.min() >= RATIO[0] * 0.99
    assert ratios.max() <= RATIO[1] * 1.01
    flips = np.mean([c.flip for c in crops])
    assert 0.47 < flips < 0.53
    lefts = np.array([c.left / max(1, 640 - c.width) for c in crops])
    assert 0.47 < lefts.mean() < 0.53


def test_the_distribution_is_that_of_torchvision() -> None:
    torch.manual_seed(0)
    image = torch.empty(3, 480, 640)
    theirs = [RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(3000)]
    ours = [crop(hash_key("torchvision", i)) for i in range(3000)]
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        for their, our in (
            ([w for _, _, _, w in theirs], [c.width for c in ours]),
            ([h for _, _, h, _ in theirs], [c.height for c in ours]),
            ([left for _, left, _, _ in theirs], [c.left for c in ours]),
            ([top for top, _, _, _ in theirs], [c.top for c in ours]),
        ):
            assert np.quantile(our, quantile) == pytest.approx(np.quantile(their, quantile), abs=20)


def test_flip_is_a_probability() -> None:
    assert not any(crop(hash_key(i), flip=0.0).flip for i in range(200))
    assert all(crop(hash_key(i), flip=1.0).flip for i in range(200))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 900), (900, 1), (2000, 10), (10, 2000)])
def test_extreme_shapes_fall_back_to_the_centre(width: int, height: int) -> None:
    for i in range(50):
        found = random_crop(width, height, scale=(0.9, 1.0), ratio=RATIO, flip=0, key=hash_key(i))
        assert 1 <= found.width <= width
        assert 1 <= found.height <= height
        assert abs(found.left - (width - found.width) / 2) <= 0.5
        assert abs(found.top - (height - found.height) / 2) <= 0.5


def test_centre_crop() -> None:
    assert center_crop(640, 480, 0.875) == Crop(110, 30, 420, 420, False)
    assert center_crop(1, 1, 0.5) == Crop(0, 0, 1, 1, False)
