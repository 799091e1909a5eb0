"""Which part of a sample is erased, and with what and how far it is mixed. Pure: NumPy only.

Random erasing: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020. mixup: Zhang et al.,
"mixup: Beyond Empirical Risk Minimization", ICLR 2018. CutMix: Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019. The distributions are
those of torchvision's `RandomErasing`, `MixUp` and `CutMix`, drawn for each sample by itself.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from orchestrator.config import AugmentConfig
from orchestrator.data.augmentation.draws import Draws, Floats, symmetric_beta
from orchestrator.data.stream import Ints

_TRIES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """A rectangle in each of k images."""

    rows: Ints
    """Which images of the micro-batch, shape (k,)."""
    edges: Ints
    """Left, top, right, bottom of each, shape (k, 4); right and bottom are just outside."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """How each image is mixed with its neighbour, the one before it (the first with the last)."""

    cut: Boxes
    """What is taken from the neighbour in cutmix."""
    blended: Ints
    """Images that mixup changes, shape (m,)."""
    weight: Floats
    """Share of the image itself in its label, shape (n,); of `blended` ones also in pixels."""


def erased(config: AugmentConfig, draws: Draws, *, side: int) -> Boxes:
    """Return the rectangles that random erasing fills."""
    chosen = draws.uniforms("erasing", 1)[:, 0] < config.erasing
    tries = draws.uniforms("erasing box", 4 * _TRIES).reshape(len(draws), _TRIES, 4)
    share, shape, x, y = np.moveaxis(tries, 2, 0)
    low, high = np.log(config.erasing_ratio)
    area = side * side * _between(config.erasing_scale, share)
    aspect = np.exp(low + (high - low) * shape)
    height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (height < side) & (width < side)
    rows = np.flatnonzero(chosen & fits.any(axis=1))
    first = fits.argmax(axis=1)[rows]
    height, width, x, y = (each[rows, first] for each in (height, width, x, y))
    left, top = (x * (side - width + 1)).astype(np.int64), (y * (side - height + 1)).astype(int)
    return Boxes(rows, np.stack([left, top, left + width, top + height], axis=1))


def _between(bounds: tuple[float, float], share: Floats) -> Floats:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def mixed(config: AugmentConfig, draws: Draws, *, side: int) -> Mix:
    """Return how each image is mixed; with both methods on, each sample draws one of them."""
    chosen, switch, left, top = draws.uniforms("mix", 4).T
    use_cutmix = switch < 0.5 if config.mixup_alpha and config.cutmix_alpha else _all(draws, config)
    is_mixed = chosen < config.mix_prob
    uniforms = draws.uniforms("mix weight", 2)
    weight = np.ones(len(draws))
    blended = np.flatnonzero(is_mixed & ~use_cutmix)
    if config.mixup_alpha:
        weight[blended] = symmetric_beta(config.mixup_alpha, uniforms[blended])
    rows = np.flatnonzero(is_mixed & use_cutmix)
    edges = np.zeros((0, 4), dtype=np.int64)
    if config.cutmix_alpha:
        kept = symmetric_beta(config.cutmix_alpha, uniforms[rows])
        half = (0.5 * np.sqrt(1 - kept) * side).astype(np.int64)
        center = (np.stack([left, top], axis=1)[rows] * side).astype(np.int64)
        corners = np.concatenate([center - half[:, None], center + half[:, None]], axis=1)
        edges = np.clip(corners, 0, side)
        weight[rows] = 1 - np.prod(edges[:, 2:] - edges[:, :2], axis=1) / side**2
    return Mix(Boxes(rows, edges), blended, weight)


def _all(draws: Draws, config: AugmentConfig) -> npt.NDArray[np.bool_]:
    return np.full(len(draws), config.cutmix_alpha > 0)
