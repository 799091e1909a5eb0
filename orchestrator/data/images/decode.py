"""Encoded bytes -> pixels of one crop: header checks, decode, crop, resize, errors. Pure.

JPEG goes through libjpeg-turbo (jpeg.py: strict, without the GIL, the shown rectangle alone, at
1/2, 1/4 or 1/8 where that is enough), every other format through OpenCV. Pillow only reads headers:
it returns half of some damaged images without an error and clips 16-bit greys to white.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from orchestrator.data.images.bad import BadImage, one_line
from orchestrator.data.images.crop import TURNS, UPRIGHT, Crop, Size, View
from orchestrator.data.images.header import JPEG_START, Encoded, checked, read_other_size
from orchestrator.data.images.jpeg import (
    JpegHeader,
    Rectangle,
    decode_rectangle,
    read_header,
    read_orientation,
)

__all__ = ["BadImage", "decode", "decode_other", "read_size"]

Pixels = npt.NDArray[np.uint8]

# Standard deviations in pixels, fitted to Pillow's bilinear filter at factors from 1.02 to 1.99.
_BLUR_PER_FACTOR = 0.39
_NO_BLUR = 0.01

# One process decodes on one CPU; OpenCV's threads would fight over it. What it would log of a
# broken image is raised as BadImage.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_size(image: Encoded) -> Size:
    """Return the sides that an image's header names, before any EXIF orientation.

    Raises:
        BadImage: it is no image, or has no pixels, too many, or all in one line.
    """
    return checked(read_header(image) or read_other_size(image), len(image))


def decode(image: Encoded, out: Pixels, choose: Callable[[int, int], Crop]) -> None:
    """Write one crop of an encoded image into `out`.

    Args:
        image: encoded bytes of any common format, whatever the file was called.
        out: receives RGB, uint8, contiguous, shape (S, S, 3).
        choose: (width, height) of the upright image -> the crop to show.

    Raises:
        BadImage: it cannot be decoded to the last pixel shown, or its end is missing.
    """
    header = read_header(image)
    if header is not None:
        checked(header, len(image))
        _decode_jpeg(image, header, out, choose)
        return
    pixels = decode_other(image)
    size = Size(pixels.shape[1], pixels.shape[0])
    view = View.of(choose(size.width, size.height), size, UPRIGHT)
    _show(_cut(pixels, view), view, out)


def decode_other(image: Encoded) -> Pixels:
    """Return all pixels of anything but a common JPEG: RGB, uint8, upright, shape (H, W, 3).

    Raises:
        BadImage: it cannot be decoded to the last pixel.
    """
    size = checked(read_other_size(image), len(image))
    if image[: len(JPEG_START)] == JPEG_START and b"\xff\xd9" not in bytes(image):
        raise BadImage("truncated", "the end-of-image marker is missing")
    try:
        pixels: Pixels | None = cv2.imdecode(
            np.frombuffer(image, dtype=np.uint8), cv2.IMREAD_COLOR_RGB
        )
    except cv2.error as error:
        raise BadImage("damaged", one_line(error)) from error
    if pixels is None:
        raise BadImage("damaged", f"OpenCV cannot decode {size.width} x {size.height} pixels")
    return pixels


def _decode_jpeg(
    image: Encoded, header: JpegHeader, out: Pixels, choose: Callable[[int, int], Crop]
) -> None:
    turn = TURNS[read_orientation(image)]
    upright = Size(header.height, header.width) if turn.transpose else header
    view = View.of(choose(upright.width, upright.height), upright, turn)
    side = out.shape[0]
    eighths = header.eighths(
        min_width=math.ceil(header.width * side / (view.right - view.left)),
        min_height=math.ceil(header.height * side / (view.bottom - view.top)),
    )
    size = header.scaled(eighths)
    # A crop's edges are rounded to the scaled pixels, which are at least as fine as those shown.
    view = view.scaled(size.width / header.width, size.height / header.height)
    _show(decode_rectangle(image, header, _rectangle(view, eighths)), view, out)


def _rectangle(view: View, eighths: int = 8) -> Rectangle:
    left, top = round(view.left), round(view.top)
    width, height = max(1, round(view.right) - left), max(1, round(view.bottom) - top)
    return Rectangle(left, top, width, height, eighths)


def _cut(pixels: Pixels, view: View) -> Pixels:
    want = _rectangle(view)
    return pixels[want.top : want.top + want.height, want.left : want.left + want.width]


def _show(part: Pixels, view: View, out: Pixels) -> None:
    if view.turn == UPRIGHT:
        _resize(part, len(out), out)
        return
    shown = _resize(part, len(out))
    turn = view.turn
    if turn.mirror_x or turn.mirror_y:
        both = turn.mirror_x and turn.mirror_y
        shown = cv2.transpose(shown) if turn.transpose else shown
        cv2.flip(shown, -1 if both else int(turn.mirror_x), dst=out)
    else:
        cv2.transpose(shown, dst=out)


def _resize(pixels: Pixels, side: int, out: Pixels | None = None) -> Pixels:
    """Resize to a square without aliasing, close to Pillow's bilinear filter.

    Between 1 and 2 a small blur comes before the interpolation: 1 to 2 grey levels (RMS) from
    Pillow on photographs, where INTER_AREA is 1 to 4 away and takes twice as long.
    """
    x, y = pixels.shape[1] / side, pixels.shape[0] / side
    if max(x, y) >= 2 and min(x, y) < 1:
        # OpenCV's area mean needs both sides to shrink; else it interpolates, with aliasing.
        both = (min(pixels.shape[1], side), min(pixels.shape[0], side))
        pixels = cv2.resize(pixels, both, interpolation=cv2.INTER_AREA)
        x, y = pixels.shape[1] / side, pixels.shape[0] / side
    method = cv2.INTER_AREA if max(x, y) >= 2 else cv2.INTER_LINEAR
    if 1 < max(x, y) < 2:
        taps = (3 if x > 1 else 1, 3 if y > 1 else 1)
        pixels = cv2.GaussianBlur(pixels, taps, sigmaX=_blur(x), sigmaY=_blur(y))
    resized: Pixels = cv2.resize(pixels, (side, side), dst=out, interpolation=method)
    return resized


def _blur(factor: float) -> float:
    return _BLUR_PER_FACTOR * factor if factor > 1 else _NO_BLUR
