"""Each operation against torchvision's, on photographs."""

import math

import numpy as np
import pytest
import torch
from pictures import photographs
from torchvision.transforms.v2 import functional as F

from orchestrator.data.augmentation import ops
from orchestrator.data.augmentation.plan import Op, Slot

SIDE = 97  # odd, and no multiple of a vector's width


def images() -> torch.Tensor:
    crops = photographs(8, SIDE).permute(0, 3, 1, 2).contiguous()
    flat, grey = torch.full_like(crops[:1], 77), crops[:1, :1].expand(1, 3, -1, -1)
    two = torch.where(crops[:1] > 128, 255, 3).to(torch.uint8)
    return torch.cat([crops, flat, grey, two])


def ours(op: Op, values: list[float], *, group: int = 4) -> torch.Tensor:
    changed = images()
    ops.apply_slot(changed, Slot(np.full(len(values), op), np.array(values)), group=group)
    return changed


def theirs(op: Op, image: torch.Tensor, value: float) -> torch.Tensor:
    affine = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    tilt = math.degrees(math.atan(value))
    results = {
        Op.IDENTITY: lambda: image,
        Op.SHEAR_X: lambda: F.affine(image, **affine | {"shear": [tilt, 0.0]}, center=[0, 0]),
        Op.SHEAR_Y: lambda: F.affine(image, **affine | {"shear": [0.0, tilt]}, center=[0, 0]),
        Op.TRANSLATE_X: lambda: F.affine(image, **affine | {"translate": [int(value), 0]}),
        Op.TRANSLATE_Y: lambda: F.affine(image, **affine | {"translate": [0, int(value)]}),
        Op.ROTATE: lambda: F.rotate(image, angle=value),
        Op.BRIGHTNESS: lambda: F.adjust_brightness(image, value),
        Op.COLOR: lambda: F.adjust_saturation(image, value),
        Op.CONTRAST: lambda: F.adjust_contrast(image, value),
        Op.SHARPNESS: lambda: F.adjust_sharpness(image, value),
        Op.POSTERIZE: lambda: F.posterize(image, int(value)),
        Op.SOLARIZE: lambda: F.solarize(image, value),
        Op.AUTO_CONTRAST: lambda: F.autocontrast(image),
        Op.EQUALIZE: lambda: F.equalize(image),
        Op.HUE: lambda: F.adjust_hue(image, value),
    }
    return results[op]()


def compare(op: Op, values: list[float]) -> tuple[int, float]:
    """Return the largest difference in levels, and the share of values that differ."""
    expected = torch.stack([theirs(op, i, v) for i, v in zip(images(), values, strict=True)])
    difference = (ours(op, values).int() - expected.int()).abs()
    return int(difference.max()), float((difference > 0).double().mean())


@pytest.mark.parametrize(
    ("op", "values"),
    [
        (Op.IDENTITY, [0] * 11),
        (Op.POSTERIZE, [8, 7, 6, 5, 4, 3, 2, 1, 4, 4, 2]),
        (Op.SOLARIZE, [255, 254.5, 127.5, 0, 17, 8.5, 100, 200, 77, 77.5, 128]),
        (Op.AUTO_CONTRAST, [0] * 11),
        (Op.EQUALIZE, [0] * 11),
        (Op.TRANSLATE_X, [0, 1, -1, 13, -44, 32, 96, 97, -120, 5, 6]),
        (Op.TRANSLATE_Y, [0, 1, -1, 13, -44, 32, 96, 97, -120, 5, 6]),
    ],
)
def test_operations_on_integers_are_bit_equal(op: Op, values: list[float]) -> None:
    assert compare(op, values) == (0, 0)


@pytest.mark.parametrize("op", [Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS])
def test_blends_are_within_one_level(op: Op) -> None:
    largest, share = compare(op, [0, 0.1, 0.37, 0.73, 1, 1.27, 1.5, 1.9, 1.3, 0.6, 1.9])
    assert largest <= 1
    assert share < 0.005  # of values that lie on a level, where a last bit decides


def test_hue_is_within_one_level() -> None:
    largest, share = compare(Op.HUE, [0, 0.1, -0.1, 0.5, -0.5, 0.33, 0.25, -0.02, 0.2, 0.2, 0.4])
    assert largest <= 1
    assert share < 0.001


@pytest.mark.parametrize(
    ("op", "largest"), [(Op.SHEAR_X, 0.99), (Op.SHEAR_Y, 0.99), (Op.ROTATE, 135)]
)
def test_turned_images_take_the_same_nearest_pixels(op: Op, largest: float) -> None:
    _, share = compare(op, list(np.linspace(-largest, largest, 11)))
    assert share < 0.0005  # of places halfway between two pixels, where a last bit decides


def test_solarize_at_zero_inverts() -> None:
    assert torch.equal(ours(Op.SOLARIZE, [0] * 11), F.invert(images()))


@pytest.mark.parametrize("op", list(Op))
def test_a_result_does_not_depend_on_the_group(op: Op) -> None:
    value = {Op.POSTERIZE: 4, Op.SOLARIZE: 99, Op.HUE: 0.13, Op.ROTATE: 33}.get(op, 0.3)
    values = [value] * 10 + [value + 1]
    alone = ours(op, values, group=1)
    for group in (2, 3, 7, 11):
        assert torch.equal(ours(op, values, group=group), alone)


def test_each_sample_gets_its_own_operation() -> None:
    drawn = np.array([Op(i % len(Op)) for i in range(11)])
    values = np.where(drawn == Op.POSTERIZE, 3, 0.4)
    changed = images()
    ops.apply_slot(changed, Slot(drawn, values))
    for row, op in enumerate(drawn):
        assert torch.equal(changed[row], ours(Op(op), [values[row]] * 11)[row])


def test_images_smaller_than_a_kernel_pass() -> None:
    tiny = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    for op in Op:
        changed = tiny.clone()
        ops.apply_slot(changed, Slot(np.array([op]), np.array([1.0])))
        assert changed.shape == tiny.shape
    ops.apply_slot(tiny, Slot(np.array([Op.SHARPNESS]), np.array([0.0])))
    assert tiny.flatten().tolist() == list(range(12))
