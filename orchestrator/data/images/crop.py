"""Which part of an image is shown, and where it lies in the stored pixels. Pure."""

import dataclasses
import math

_TRIES = 10
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_WORD = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Size:
    """Sides of an image in pixels."""

    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Crop:
    """The part of an upright image (EXIF orientation applied) that is shown, in its pixels."""

    left: int
    top: int
    width: int
    height: int
    flip: bool
    """Whether left and right are swapped."""


def random_crop(
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    key: int,
) -> Crop:
    """Return a random resized crop and flip that depend on nothing but the arguments.

    The distribution is torchvision's `RandomResizedCrop` (Szegedy et al., "Going Deeper with
    Convolutions", CVPR 2015, section 6): a share of the area from `scale` and a logarithmically
    uniform width / height from `ratio`, ten tries, then the largest centre crop within `ratio`.
    """
    mirrored = _uniform(key, 0) < flip
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for first in range(1, 4 * _TRIES, 4):
        share, shape = _uniform(key, first), _uniform(key, first + 1)
        area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = _uniform(key, first + 2), _uniform(key, first + 3)
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return Crop(left, top, w, h, mirrored)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Crop((width - w) // 2, (height - h) // 2, w, h, mirrored)


def _uniform(key: int, number: int) -> float:
    """Return one of a key's numbers in [0, 1): splitmix64 (see stream.py) counted up from `key`.

    Plain integers: of an image's five draws NumPy would make 60 us, these are 5.
    """
    word = (key + (number + 1) * _GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return float(((word ^ (word >> 31)) >> 11) * 2.0**-53)


def center_crop(width: int, height: int, fraction: float) -> Crop:
    """Return the square in the centre whose side is `fraction` of the shorter side."""
    side = max(1, round(min(width, height) * fraction))
    return Crop((width - side) // 2, (height - side) // 2, side, side, False)


@dataclasses.dataclass(frozen=True)
class Turn:
    """How stored pixels become upright ones: first transpose, then mirror."""

    transpose: bool
    mirror_x: bool
    mirror_y: bool


UPRIGHT = Turn(False, False, False)
# EXIF 2.32, section 4.6.4 A, tag Orientation.
TURNS = {
    1: UPRIGHT,
    2: Turn(False, True, False),
    3: Turn(False, True, True),
    4: Turn(False, False, True),
    5: Turn(True, False, False),
    6: Turn(True, True, False),
    7: Turn(True, True, True),
    8: Turn(True, False, True),
}


@dataclasses.dataclass(frozen=True)
class View:
    """A crop in the coordinates of stored pixels, and how it is turned after resizing."""

    left: float
    top: float
    right: float
    bottom: float
    turn: Turn

    @classmethod
    def of(cls, crop: Crop, upright: Size, turn: Turn) -> "View":
        """Translate a crop of the upright image."""
        left, top = crop.left, crop.top
        if turn.mirror_x:
            left = upright.width - left - crop.width
        if turn.mirror_y:
            top = upright.height - top - crop.height
        turn = dataclasses.replace(turn, mirror_x=turn.mirror_x != crop.flip)
        right, bottom = left + crop.width, top + crop.height
        if turn.transpose:
            return cls(top, left, bottom, right, turn)
        return cls(left, top, right, bottom, turn)

    def scaled(self, x: float, y: float) -> "View":
        """Return the same view of the image decoded at x times its width, y times its height."""
        return View(self.left * x, self.top * y, self.right * x, self.bottom * y, self.turn)
