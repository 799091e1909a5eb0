"""Worker side: operations on a group of uint8 images at once, on any device.

Each kernel takes images uint8 (n, 3, S, S) and one float64 value for each, shape (n,), and returns
uint8 of the same shape. Results follow torchvision 0.29's tensor kernels: bit for bit where they
compute with integers, within one level elsewhere. A sample's result does not depend on the group it
is in: sums are of integers, and no product is added in one instruction (torch's `alpha=` and `lerp`
are, in the vector part of a loop but not in its tail).
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from orchestrator.data.augmentation.draws import Floats
from orchestrator.data.augmentation.plan import Op, Slot
from orchestrator.data.stream import Ints

# ITU-R BT.601, rounded as torchvision does.
_GREY = (0.2989, 0.587, 0.114)
_BLUR_SUM = 13  # of the 3 x 3 kernel [[1, 1, 1], [1, 5, 1], [1, 1, 1]]


def apply_slot(images: torch.Tensor, slot: Slot, *, group: int | None = None) -> None:
    """Change uint8 images (n, 3, S, S) in place, each by its own operation.

    Args:
        images: on any device.
        slot: the operations.
        group: images that a kernel is given at once; None: on a CPU one, whose floats stay in the
            cache (colour jitter of 64 images: two thirds of the time); elsewhere all.
    """
    group = group or (len(images) if images.is_cuda else 1)
    for ops, kernel in _KERNELS.items():
        rows = np.flatnonzero(np.isin(slot.op, ops))
        for part in (rows[i : i + group] for i in range(0, len(rows), group)):
            if len(part) == 1:
                chosen = images[part[0] : part[0] + 1]
                chosen.copy_(kernel(chosen, slot.op[part], slot.value[part]))
            else:
                index = torch.from_numpy(part).to(images.device, non_blocking=True)
                changed = kernel(images.index_select(0, index), slot.op[part], slot.value[part])
                images.index_copy_(0, index, changed)


def _column(values: Floats, like: torch.Tensor) -> torch.Tensor:
    column = torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)
    return column.to(like.device, non_blocking=True)


def affine(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Shear about the upper left corner, shift, or rotate about the centre: nearest pixel or 0."""
    side = images.shape[-1]
    x_of, y_of = _inverse_maps(op, value, side)
    center = torch.arange(side, dtype=torch.float32, device=images.device) - (side - 1) / 2
    x, y = (_source(images, coefficients, center) for coefficients in (x_of, y_of))
    outside = (x < 0) | (x >= side) | (y < 0) | (y >= side)
    index = (y * side + x).masked_fill_(outside, 0).long().flatten(2)
    moved = images.flatten(2).gather(2, index.expand(-1, 3, -1)).view_as(images)
    return moved.masked_fill_(outside, 0)


def _source(
    images: torch.Tensor, coefficients: tuple[Floats, Floats, Floats], center: torch.Tensor
) -> torch.Tensor:
    a, b, c = (_column(each, images) for each in coefficients)
    return (center * a + (center[:, None] * b + c)).add_((len(center) - 1) / 2).round_()


def _inverse_maps(
    op: Ints, value: Floats, side: int
) -> tuple[tuple[Floats, Floats, Floats], tuple[Floats, Floats, Floats]]:
    """Return (a, b, c) of source x = a x + b y + c, and of source y, about the image's centre."""
    zero = np.zeros(len(op))
    angle = np.where(op == Op.ROTATE, value * math.pi / 180, zero)
    shear_x, shear_y = np.where(op == Op.SHEAR_X, value, zero), np.where(op == Op.SHEAR_Y, value, 0)
    shift_x = np.where(op == Op.TRANSLATE_X, -value, shear_x * side / 2)
    shift_y = np.where(op == Op.TRANSLATE_Y, -value, shear_y * side / 2)
    return (
        (np.cos(angle), shear_x - np.sin(angle), shift_x),
        (shear_y + np.sin(angle), np.cos(angle), shift_y),
    )


def _blend(images: torch.Tensor, other: torch.Tensor, factor: Floats) -> torch.Tensor:
    """Return other + factor * (images - other), cut off as Pillow does; exact where they agree."""
    mixed = images.to(torch.float32) - other
    return mixed.mul_(_column(factor, images)).add_(other).clamp_(0, 255).to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = (images[:, c : c + 1] * weight for c, weight in enumerate(_GREY))
    return red.add_(green).add_(blue).floor_()


def brightness(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Blend with black."""
    return (images * _column(value, images)).clamp_(0, 255).to(torch.uint8)


def color(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Blend with the grey image."""
    return _blend(images, _grey(images), value)


def contrast(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Blend with the mean grey level."""
    total = _grey(images).to(torch.int32).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(images, (total / images[0, 0].numel()).to(torch.float32), value)


def sharpness(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Blend with the image smoothed by a 3 x 3 kernel; the border stays."""
    if images.shape[-1] < 3:
        return images
    levels = images.to(torch.int16)
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    box += levels[:, :, 1:-1, 1:-1] * 4
    # A thirteenth of an integer is never halfway between two, so the rounding is exact.
    smooth = (box * (1 / _BLUR_SUM)).round_()
    sharp = images.clone()
    sharp[:, :, 1:-1, 1:-1] = _blend(images[:, :, 1:-1, 1:-1], smooth, value)
    return sharp


def posterize(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Keep the highest bits."""
    masks = (255 << (8 - value.astype(np.int64))) & 255
    return images & torch.from_numpy(masks.astype(np.uint8)).view(-1, 1, 1, 1).to(images.device)


def solarize(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Invert what is at least as bright as the threshold."""
    return torch.where(images >= _column(np.ceil(value), images), images.bitwise_not(), images)


def auto_contrast(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Stretch each channel to 0 to 255; a flat one stays."""
    low, high = (each.to(torch.float32) for each in torch.aminmax(images.flatten(2), dim=2))
    flat = low == high
    low, scale = low.masked_fill(flat, 0), (high - low).mul_(1 / 255).masked_fill_(flat, 1)
    stretched = (images - low[..., None, None]).div_(scale[..., None, None])
    return stretched.clamp_(0, 255).to(torch.uint8)


def equalize(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Flatten each channel's histogram with Pillow's table (ImageOps.equalize)."""
    levels = images.flatten(2).flatten(0, 1).long()
    first_bin = torch.arange(len(levels), device=images.device)[:, None] * 256
    counts = torch.bincount((levels + first_bin).flatten(), minlength=len(levels) * 256)
    counts = counts.view(-1, 256)
    brightest = counts.gather(1, levels.amax(1, keepdim=True))
    step = (levels.shape[1] - brightest).div_(255, rounding_mode="floor")
    below = counts.cumsum(1) - counts
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.to(torch.uint8).gather(1, levels).view_as(images)


def hue(images: torch.Tensor, op: Ints, value: Floats) -> torch.Tensor:
    """Turn the hue of HSV colours, in the closed form of their sector functions.

    https://en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative".
    """
    red, green, blue = images.to(torch.float32).unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        top == red,
        (green - blue) / divisor,
        torch.where(top == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sector += _column(value * 6, images)[:, 0]
    turned = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        place = (sector + offset).remainder_(6)
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        # As torchvision scales floats to uint8: 255.999 levels, then cut off.
        turned[:, channel] = (top - chroma * share).mul_(255.999 / 255).to(torch.uint8)
    return turned


Kernel = Callable[[torch.Tensor, Ints, Floats], torch.Tensor]
_KERNELS: dict[tuple[Op, ...], Kernel] = {
    (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE): affine,
    (Op.BRIGHTNESS,): brightness,
    (Op.COLOR,): color,
    (Op.CONTRAST,): contrast,
    (Op.SHARPNESS,): sharpness,
    (Op.POSTERIZE,): posterize,
    (Op.SOLARIZE,): solarize,
    (Op.AUTO_CONTRAST,): auto_contrast,
    (Op.EQUALIZE,): equalize,
    (Op.HUE,): hue,
}
