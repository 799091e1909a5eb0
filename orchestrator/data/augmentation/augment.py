"""Worker side: random changes of a micro-batch's pixels and labels, on the training device.

In this order: colour jitter, the policy, the user's transforms, random erasing, then mixup or
cutmix. Crop and flip come before, while an image is decoded.
"""

import dataclasses

import numpy as np
import torch

from orchestrator.config import AugmentConfig, DataConfig, UserError
from orchestrator.data.augmentation.boxes import Boxes, Mix, erased, mixed
from orchestrator.data.augmentation.draws import Draws
from orchestrator.data.augmentation.ops import apply_slot
from orchestrator.data.augmentation.plan import NUM_MAGNITUDES, jitter_slots, policy_slots
from orchestrator.data.augmentation.user import UserTransforms
from orchestrator.data.batch import MicroBatch
from orchestrator.data.index import LabelKind

_MIXED_LABELS = ("class", "multi")


@dataclasses.dataclass(frozen=True, eq=False)
class Augmented:
    """Pixels on the training device, and what is left to do after their normalisation."""

    pixels: torch.Tensor
    """uint8, shape (n, S, S, 3)."""
    mix: Mix | None
    """How labels are mixed, and which images mixup has yet to blend."""
    partners: torch.Tensor | None
    """uint8 (m, S, S, 3): what `mix.blended` images are blended with."""


class Augment:
    """`data.augment`, keyed by (seed, epoch, sample id).

    All numbers of a sample are its own: the same in any micro-batch, at any world size and after
    any restart. Only the partner of mixup and cutmix, the sample one position before in the
    micro-batch (the first takes the last), may be another one where a micro-batch's edge moves.

    Raises:
        UserError: one of `data.augment.transforms` cannot be used.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.mixes = mixes(data.augment)
        """Whether labels are mixed."""
        self._config = data.augment
        self._seed = seed
        self._transforms = UserTransforms(data.augment.transforms, side=data.image_size)
        mean = np.rint(np.array(data.mean) * 255).clip(0, 255).astype(np.uint8)
        self._mean = torch.from_numpy(mean).view(1, 3, 1, 1)

    def __call__(self, pixels: torch.Tensor, batch: MicroBatch) -> Augmented:
        """Return changed copies of uint8 pixels (n, S, S, 3) on any device."""
        draws = Draws(self._seed, epochs=batch.epochs, ids=batch.ids)
        # Planar while it is changed: kernels then run over whole rows of one channel.
        images = pixels.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        side = images.shape[-1]
        for slot in jitter_slots(self._config, draws):
            apply_slot(images, slot)
        for slot in policy_slots(self._config, draws, side=side):
            apply_slot(images, slot)
        if len(self._transforms):
            self._transforms.apply(images, draws.words("transforms", len(self._transforms)))
        if self._config.erasing:
            _fill(images, erased(self._config, draws, side=side), self._mean.to(images.device))
        if not self.mixes:
            return Augmented(_interleaved(images), None, None)
        mix = mixed(self._config, draws, side=side)
        neighbours = images.roll(1, 0)
        blended = torch.from_numpy(mix.blended).to(images.device)
        partners = _interleaved(neighbours.index_select(0, blended))
        _fill(images, mix.cut, neighbours)
        return Augmented(_interleaved(images), mix, partners)


def _interleaved(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1).contiguous()


def _fill(images: torch.Tensor, boxes: Boxes, content: torch.Tensor) -> None:
    """Put `content`, (n, 3, S, S) or (1, 3, 1, 1), into the boxes of images (n, 3, S, S)."""
    if not boxes.rows.size:
        return
    index = torch.from_numpy(boxes.rows).to(images.device)
    left, top, right, bottom = torch.from_numpy(boxes.edges).to(images.device).T[:, :, None]
    place = torch.arange(images.shape[-1], device=images.device)
    across, down = (place >= left) & (place < right), (place >= top) & (place < bottom)
    inside = (down[:, :, None] & across[:, None, :])[:, None]
    new = content if len(content) == 1 else content.index_select(0, index)
    images.index_copy_(0, index, torch.where(inside, new, images.index_select(0, index)))


def mixes(config: AugmentConfig) -> bool:
    """Return whether mixup or cutmix is on."""
    return config.mix_prob > 0 and (config.mixup_alpha > 0 or config.cutmix_alpha > 0)


def is_on(config: AugmentConfig) -> bool:
    """Return whether anything of `data.augment` changes an image."""
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    policy = config.policy != "none"
    return bool(any(jitter) or policy or config.transforms or config.erasing or mixes(config))


def check(data: DataConfig, *, label_kind: LabelKind) -> None:
    """Hold `data.augment` against its ranges and the data set's labels, and try its transforms.

    Raises:
        UserError: a value cannot work.
    """
    config = data.augment
    for name, value in (
        ("brightness", config.brightness),
        ("contrast", config.contrast),
        ("saturation", config.saturation),
        ("mixup_alpha", config.mixup_alpha),
        ("cutmix_alpha", config.cutmix_alpha),
    ):
        _require(name, value, 0 <= value < float("inf"), "must be a number from 0 on")
    _require("hue", config.hue, 0 <= config.hue <= 0.5, "must be from 0 to 0.5")
    for name, value in (("erasing", config.erasing), ("mix_prob", config.mix_prob)):
        _require(name, value, 0 <= value <= 1, "must be a probability, from 0 to 1")
    _require("num_ops", config.num_ops, config.num_ops >= 1, "must be at least 1")
    inside = 0 <= config.magnitude < NUM_MAGNITUDES
    _require("magnitude", config.magnitude, inside, f"must be from 0 to {NUM_MAGNITUDES - 1}")
    low, high = config.erasing_scale
    rule = "must be two ascending shares above 0 and up to 1"
    _require("erasing_scale", [low, high], 0 < low <= high <= 1, rule)
    low, high = config.erasing_ratio
    _require("erasing_ratio", [low, high], 0 < low <= high, "must be two ascending numbers above 0")
    for name in ("mixup_alpha", "cutmix_alpha"):
        value = getattr(config, name)
        rule = f"mixes labels, but those of this data set are {label_kind!r}; set it to 0"
        _require(name, value, not value or label_kind in _MIXED_LABELS, rule)
    UserTransforms(config.transforms, side=data.image_size)


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        remedy = "" if ";" in rule else "; change it"
        raise UserError(f"data.augment.{name}={value!r} {rule}{remedy}.")
