"""Worker side: transforms that the user names by class_path, one image at a time.

Slower than the built-in ones: each image costs a Python call, a reseeding of torch's generator and
the transform's own small tensors. A transform that draws from Python's or NumPy's generators
instead of torch's is not keyed: its numbers change with world size and restarts.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from orchestrator.config import UserError
from orchestrator.data.stream import Words

Transform = Callable[[torch.Tensor], torch.Tensor]
_FIELD = "data.augment.transforms"
_KEYS = {"class_path", "init_args"}
_PROBE_SEED = 0


class UserTransforms:
    """The transforms of `data.augment.transforms`, built and tried on a grey image.

    Raises:
        UserError: one does not import, cannot be built or called, or changes shape or dtype.
    """

    def __init__(self, entries: Sequence[dict[str, Any]], *, side: int) -> None:
        self._transforms = [_build(entry, place) for place, entry in enumerate(entries)]
        self._names = [f"{_FIELD}[{p}] ({e['class_path']})" for p, e in enumerate(entries)]
        grey = torch.full((3, side, side), 128, dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            for place in range(len(entries)):
                self._apply(grey, place, seed=_PROBE_SEED)

    def __len__(self) -> int:
        return len(self._transforms)

    def apply(self, images: torch.Tensor, seeds: Words) -> None:
        """Change uint8 images (n, 3, S, S) in place.

        Args:
            images: on any device.
            seeds: of torch's generators, for each image and transform, shape (n, len(self)).
        """
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            for image, row in zip(images, seeds.tolist(), strict=True):
                for place, seed in enumerate(row):
                    image.copy_(self._apply(image, place, seed=seed))

    def _apply(self, image: torch.Tensor, place: int, *, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        name = self._names[place]
        try:
            changed = self._transforms[place](image)
        except Exception as error:  # the user's code runs here and may raise anything
            raise UserError(
                f"{name} fails on a uint8 image of shape {tuple(image.shape)} "
                f"({_describe(error)}); mend its init_args or leave it out."
            ) from error
        found = (changed.dtype, changed.shape) if isinstance(changed, torch.Tensor) else None
        if found != (torch.uint8, image.shape):
            what = f"{found[0]} of shape {tuple(found[1])}" if found else type(changed).__name__
            raise UserError(
                f"{name} must return what it is given, torch.uint8 of shape {tuple(image.shape)}, "
                f"not {what}; cropping, resizing and normalising are done elsewhere, so leave it "
                "out."
            )
        return changed


def _build(entry: dict[str, Any], place: int) -> Transform:
    name = f"{_FIELD}[{place}]"
    if "class_path" not in entry or not entry.keys() <= _KEYS:
        raise UserError(
            f"{name} must have the keys class_path and init_args, not {sorted(entry)}; change it."
        )
    path, args = entry["class_path"], entry.get("init_args") or {}
    module_name, _, attribute = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's module runs here and may raise anything
        raise UserError(
            f"{name}.class_path={path!r} does not import ({_describe(error)}); check the spelling "
            "and that its package is installed."
        ) from error
    try:
        built: Transform = found(**args)
    except Exception as error:  # the user's constructor may raise anything
        raise UserError(
            f"{name}.init_args={args!r} do not fit {path} ({_describe(error)}); change them."
        ) from error
    if not callable(built):
        raise UserError(
            f"{name}.class_path={path!r} builds a {type(built).__name__}, which cannot be called "
            "with an image; name a transform."
        )
    return built


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
