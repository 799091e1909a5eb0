"""Encoded bytes -> pixels of one crop: header checks, scaled decode, crop, resize, errors. Pure.

JPEG goes through libjpeg-turbo (simplejpeg: strict, releases the GIL, decodes at 1/2, 1/4 or 1/8
for less than a full decode), every other format through OpenCV. Pillow only reads headers: it
returns half of some damaged images without an error and clips 16-bit greys to white.
"""

import dataclasses
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from orchestrator.data.crop import TURNS, UPRIGHT, Crop, Size, View, center_crop, random_crop

__all__ = ["BadImage", "Crop", "Size", "center_crop", "decode", "random_crop", "read_size"]

Pixels = npt.NDArray[np.uint8]

# Pillow's own warning bound (a quarter of a GiB of RGB): a header may promise far more than the
# machine's memory in a few bytes, so it is checked before anything is decoded.
MAX_PIXELS = 178_956_970 // 2

# Below a factor of 2 libjpeg-turbo's scaled inverse DCTs are slower than its full-size one.
_MIN_JPEG_FACTOR = 2
# Standard deviations in pixels, fitted to Pillow's bilinear filter at factors from 1.02 to 1.99.
_BLUR_PER_FACTOR = 0.39
_NO_BLUR = 0.01
_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_EXIF_HEADER = b"Exif\0\0"
_EXIF_ORIENTATION = 0x0112

# One process decodes on one CPU; OpenCV's threads would fight over it. What it would log of a
# broken image is raised as BadImage.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BadImage(Exception):
    """An image that cannot be decoded.

    Attributes:
        reason: one of empty, not_an_image, no_pixels, too_many_pixels, truncated, damaged, or what
            a caller says ("checksum").
        detail: one line for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def read_size(image: bytes) -> Size:
    """Return the sides that an image's header names, before any EXIF orientation.

    Raises:
        BadImage: it is no image, or has no pixels or too many.
    """
    return _checked(_read_jpeg_header(image) or _read_other_size(image))


def decode(image: bytes, out: Pixels, choose: Callable[[int, int], Crop]) -> None:
    """Write one crop of an encoded image into `out`.

    Args:
        image: encoded bytes of any common format, whatever the file was called.
        out: receives RGB, uint8, contiguous, shape (S, S, 3).
        choose: (width, height) of the upright image -> the crop to show.

    Raises:
        BadImage: it cannot be decoded to the last pixel.
    """
    header = _read_jpeg_header(image)
    size = _checked(header or _read_other_size(image))
    if header is not None:
        _decode_jpeg(image, header, out, choose)
    else:
        pixels = _decode_other(image, size)
        size = Size(pixels.shape[1], pixels.shape[0])
        _show(pixels, View.of(choose(size.width, size.height), size, UPRIGHT), out)


def _show(pixels: Pixels, view: View, out: Pixels) -> None:
    left, top = round(view.left), round(view.top)
    right, bottom = max(left + 1, round(view.right)), max(top + 1, round(view.bottom))
    part = pixels[top:bottom, left:right]
    if view.turn == UPRIGHT:
        _resize(part, len(out), out)
        return
    shown = _resize(part, len(out))
    if view.turn.transpose:
        shown = cv2.transpose(shown)
    if view.turn.mirror_x or view.turn.mirror_y:
        both = view.turn.mirror_x and view.turn.mirror_y
        shown = cv2.flip(shown, -1 if both else int(view.turn.mirror_x))
    out[:] = shown


def _resize(pixels: Pixels, side: int, out: Pixels | None = None) -> Pixels:
    """Resize to a square without aliasing, close to Pillow's bilinear filter.

    Between 1 and 2 a small blur comes before the interpolation: 1 to 2.5 grey levels (RMS) from
    Pillow on photographs, where INTER_AREA is 1 to 4 away and takes three times as long.
    """
    x, y = pixels.shape[1] / side, pixels.shape[0] / side
    method = cv2.INTER_AREA if max(x, y) >= 2 else cv2.INTER_LINEAR
    if 1 < max(x, y) < 2:
        pixels = cv2.GaussianBlur(pixels, (3, 3), sigmaX=_blur(x), sigmaY=_blur(y))
    resized: Pixels = cv2.resize(pixels, (side, side), dst=out, interpolation=method)
    return resized


def _blur(factor: float) -> float:
    return _BLUR_PER_FACTOR * factor if factor > 1 else _NO_BLUR


@dataclasses.dataclass(frozen=True)
class _JpegHeader(Size):
    colorspace: str


def _read_jpeg_header(image: bytes) -> _JpegHeader | None:
    """Return a JPEG's header, or None for what libjpeg-turbo's simple API does not take."""
    if not image.startswith(_JPEG_START):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        # Also said of sound images with uncommon subsampling, which OpenCV decodes.
        return None
    return _JpegHeader(width, height, colorspace)


def _read_other_size(image: bytes) -> Size:
    if not image:
        raise BadImage("empty", "there are no bytes")
    if image.startswith(_PNG_START):
        return _read_png_size(image)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image)) as opened:
            return Size(opened.width, opened.height)
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", _one_line(error)) from error
    except UnidentifiedImageError as error:
        known = image.startswith((_JPEG_START, _PNG_START[:8]))
        reason = "damaged" if known else "not_an_image"
        raise BadImage(reason, f"no image format is known for {image[:8]!r}...") from error
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's plugins raise whatever a damaged header makes them stumble over.
        raise BadImage("damaged", _one_line(error)) from error


def _read_png_size(image: bytes) -> Size:
    """Return what the header says, once every chunk is known to be there.

    OpenCV believes the length that a chunk claims and allocates up to 4 GB for it.
    """
    at, kind = len(_PNG_START) - 8, b""
    while kind != b"IEND":
        if at + 12 > len(image):
            raise BadImage("truncated", f"the PNG ends after its chunk {kind.decode('latin-1')!r}")
        length, kind = struct.unpack_from(">I4s", image, at)
        at += 12 + length
    width, height, _, checksum = struct.unpack_from(">II5sI", image, len(_PNG_START))
    if at > len(image) or zlib.crc32(image[12:29]) != checksum:
        raise BadImage("damaged", "a PNG chunk's length or checksum is wrong")
    return Size(width, height)


def _decode_other(image: bytes, size: Size) -> Pixels:
    try:
        pixels: Pixels | None = cv2.imdecode(
            np.frombuffer(image, dtype=np.uint8), cv2.IMREAD_COLOR_RGB
        )
    except cv2.error as error:
        raise BadImage("damaged", _one_line(error)) from error
    if pixels is None:
        raise BadImage("damaged", f"OpenCV cannot decode {size.width} x {size.height} pixels")
    return pixels


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _checked(size: Size) -> Size:
    if size.width < 1 or size.height < 1:
        raise BadImage("no_pixels", f"the header says {size.width} x {size.height} pixels")
    if size.width * size.height > MAX_PIXELS:
        raise BadImage(
            "too_many_pixels",
            f"the header says {size.width} x {size.height} pixels, more than {MAX_PIXELS}",
        )
    return size


def _decode_jpeg(
    image: bytes, header: _JpegHeader, out: Pixels, choose: Callable[[int, int], Crop]
) -> None:
    turn = TURNS[_orientation(image)]
    upright = Size(header.height, header.width) if turn.transpose else header
    crop = choose(upright.width, upright.height)
    view = View.of(crop, upright, turn)
    side = out.shape[0]
    pixels = _jpeg_pixels(
        image,
        header.colorspace,
        min_width=math.ceil(header.width * side / (view.right - view.left)),
        min_height=math.ceil(header.height * side / (view.bottom - view.top)),
    )
    height, width = pixels.shape[:2]
    # A crop's edges are rounded to the scaled pixels, which are at least as fine as those shown.
    _show(pixels, view.scaled(width / header.width, height / header.height), out)


def _jpeg_pixels(image: bytes, colorspace: str, *, min_width: int, min_height: int) -> Pixels:
    four = colorspace in ("CMYK", "YCCK")
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            image,
            "CMYK" if four else "RGB",
            min_width=min_width,
            min_height=min_height,
            min_factor=_MIN_JPEG_FACTOR,
            strict=True,
        )
    except ValueError as error:
        reason = "truncated" if "Premature end of JPEG file" in str(error) else "damaged"
        raise BadImage(reason, _one_line(error)) from error
    if not four:
        return pixels
    # Adobe stores CMYK inverted, and nobody else writes it: 255 is no ink, black multiplies.
    product = pixels[..., :3].astype(np.uint16) * pixels[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


def _orientation(image: bytes) -> int:
    """Return a JPEG's EXIF orientation (1 where there is none) from the segments in front."""
    at = 2
    while at + 4 <= len(image) and image[at] == 0xFF and 0xE0 <= image[at + 1] <= 0xEF:
        end = at + 2 + int.from_bytes(image[at + 2 : at + 4], "big")
        if image[at + 1] == 0xE1 and image.startswith(_EXIF_HEADER, at + 4):
            return _tiff_orientation(image[at + 4 + len(_EXIF_HEADER) : end])
        at = end
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == _EXIF_ORIENTATION:
                return value if value in TURNS else 1
    except struct.error:
        return 1  # A damaged tag is no reason to refuse the pixels; Pillow ignores it as well.
    return 1
