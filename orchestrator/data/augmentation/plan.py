"""Which operations change which sample, and how strongly. Pure: NumPy only.

RandAugment: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
space", CVPR Workshops 2020. TrivialAugment: Mueller and Hutter, "TrivialAugment: Tuning-free Yet
State-of-the-Art Data Augmentation", ICCV 2021 (its wide space). The operations and their strengths
are those of torchvision 0.29 (`RandAugment` and `TrivialAugmentWide` of transforms.v2, 31 bins).
"""

import dataclasses
import enum
import functools

import numpy as np

from orchestrator.config import AugmentConfig, Policy
from orchestrator.data.augmentation.draws import Draws, Floats
from orchestrator.data.stream import Ints

NUM_MAGNITUDES = 31


class Op(enum.IntEnum):
    """What is done to an image; the comment says what its value means."""

    IDENTITY = 0
    SHEAR_X = 1  # pixels to the side per pixel down
    SHEAR_Y = 2
    TRANSLATE_X = 3  # pixels
    TRANSLATE_Y = 4
    ROTATE = 5  # degrees, counter-clockwise
    BRIGHTNESS = 6  # factor
    COLOR = 7  # factor; 0 is grey
    CONTRAST = 8  # factor
    SHARPNESS = 9  # factor; 0 is blurred
    POSTERIZE = 10  # bits that stay
    SOLARIZE = 11  # from this grey level on colours are inverted
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    HUE = 14  # share of the circle


# Both policies draw from these, evenly.
POLICY_OPS = tuple(op for op in Op if op != Op.HUE)
_FACTORS = (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS)
_SIGNED = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE, *_FACTORS)


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One operation for each sample."""

    op: Ints
    """Numbers of `Op`, shape (n,)."""
    value: Floats
    """What `Op` says, shape (n,)."""


@functools.cache
def magnitudes(policy: Policy, side: int) -> Floats:
    """Return the strength of each of POLICY_OPS in each of the 31 bins, shape (14, 31).

    The value of a factor lies this far from 1; signs are drawn.
    """
    wide = policy == "trivialaugment"
    table = np.zeros((len(POLICY_OPS), NUM_MAGNITUDES))
    bins = np.linspace(0, 1, NUM_MAGNITUDES)
    for op in (Op.SHEAR_X, Op.SHEAR_Y):
        table[op] = bins * (0.99 if wide else 0.3)
    for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        table[op] = np.trunc(np.linspace(0, 32 if wide else 150 / 331 * side, NUM_MAGNITUDES))
    table[Op.ROTATE] = bins * (135 if wide else 30)
    for op in _FACTORS:
        table[op] = bins * (0.99 if wide else 0.9)
    table[Op.POSTERIZE] = np.rint(8 - bins * (6 if wide else 4))
    table[Op.SOLARIZE] = 255 * np.arange(NUM_MAGNITUDES)[::-1] / (NUM_MAGNITUDES - 1)
    return table


def policy_slots(config: AugmentConfig, draws: Draws, *, side: int) -> list[Slot]:
    """Return what the policy does, in order."""
    if config.policy == "none":
        return []
    table = magnitudes(config.policy, side)
    trivial = config.policy == "trivialaugment"
    slots = []
    for place in range(1 if trivial else config.num_ops):
        chosen, strength, sign = draws.uniforms(f"policy {place}", 3).T
        op = (chosen * len(POLICY_OPS)).astype(np.int64)
        bins = (strength * NUM_MAGNITUDES).astype(np.int64) if trivial else config.magnitude
        value = table[op, bins]
        value = np.where(np.isin(op, _SIGNED) & (sign < 0.5), -value, value)
        slots.append(Slot(op, value + np.isin(op, _FACTORS)))
    return slots


def jitter_slots(config: AugmentConfig, draws: Draws) -> list[Slot]:
    """Return colour jitter: each of its operations once, in an order of the sample's own.

    The distribution is torchvision's `ColorJitter`.
    """
    ranges = {
        Op.BRIGHTNESS: (max(0.0, 1 - config.brightness), 1 + config.brightness),
        Op.CONTRAST: (max(0.0, 1 - config.contrast), 1 + config.contrast),
        Op.COLOR: (max(0.0, 1 - config.saturation), 1 + config.saturation),
        Op.HUE: (-config.hue, config.hue),
    }
    used = [op for op, (low, high) in ranges.items() if low < high]
    if not used:
        return []
    # By the operation's number: switching one on leaves the numbers of the others as they are.
    uniforms = draws.uniforms("jitter", len(Op))
    values = np.stack([low + (high - low) * uniforms[:, op] for op, (low, high) in ranges.items()])
    values = values[[list(ranges).index(op) for op in used]]
    order = np.argsort(draws.uniforms("jitter order", len(Op))[:, used], axis=1, kind="stable")
    ops = np.array(used, dtype=np.int64)
    samples = np.arange(len(draws))
    return [Slot(ops[first], values[first, samples]) for first in order.T]
