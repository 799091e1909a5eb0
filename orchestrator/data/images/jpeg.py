"""A rectangle of a JPEG -> pixels, strictly. Pure.

Where our small C module `_jpeg` was built, it lets the libjpeg-turbo of Pillow's wheel decode the
rectangle alone; elsewhere simplejpeg decodes the whole and the rest is cut away. The pixels are the
same to the last bit; the cost is not, and damage below the rectangle is seen by the second only.
"""

import contextlib
import dataclasses
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg

from orchestrator.data.images.bad import BadImage, one_line
from orchestrator.data.images.crop import TURNS, Size
from orchestrator.data.images.header import JPEG_START, Encoded

try:
    from orchestrator.data.images import _jpeg
except ImportError:  # built only where there was a C compiler
    _IS_BUILT = False
else:
    _IS_BUILT = True

Pixels = npt.NDArray[np.uint8]

# Below a factor of 2 libjpeg-turbo's scaled inverse DCTs are slower than its full-size one.
_SCALES = (1, 2, 4)
# A legal file may repeat scans for ever; photographs have about ten. The same number is in _jpeg.c.
_MAX_SCANS = 100
_EXIF_HEADER = b"Exif\0\0"
_EXIF_ORIENTATION = 0x0112
_PREMATURE = ("Premature end of JPEG file", "rows are missing")


@dataclasses.dataclass(frozen=True)
class JpegHeader(Size):
    """What a JPEG's header says."""

    colorspace: str

    @property
    def channels(self) -> int:
        """Bytes a pixel has when decoded: 4 for inks, 3 for everything else."""
        return 4 if self.colorspace in ("CMYK", "YCCK") else 3

    def scaled(self, eighths: int) -> Size:
        """Return the sides of a decode at this many eighths of the size."""
        return Size(-(-self.width * eighths // 8), -(-self.height * eighths // 8))

    def eighths(self, *, min_width: int, min_height: int) -> int:
        """Return the smallest scale (1, 2, 4 or 8 eighths) that has at least these sides."""
        for eighths in _SCALES:
            size = self.scaled(eighths)
            if size.width >= min_width and size.height >= min_height:
                return eighths
        return 8


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """Whole pixels of an image decoded at `eighths` / 8 of its size."""

    left: int
    top: int
    width: int
    height: int
    eighths: int = 8


def read_header(image: Encoded) -> JpegHeader | None:
    """Return a JPEG's header, or None for what libjpeg-turbo's simple interface does not take.

    Raises:
        BadImage: there is damage between its segments.
    """
    if image[: len(JPEG_START)] != JPEG_START:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError as error:
        if str(error).startswith("Corrupt JPEG data"):
            raise BadImage("damaged", one_line(error)) from error
        # Uncommon subsampling or an unknown JFIF version: OpenCV decodes these, less strictly.
        return None
    return JpegHeader(width, height, colorspace)


def decode_rectangle(image: Encoded, header: JpegHeader, want: Rectangle) -> Pixels:
    """Return the RGB pixels of a rectangle: uint8, shape (height, width, 3).

    Raises:
        BadImage: truncated anywhere, or damaged in the rectangle or above it.
    """
    try:
        if DECODER == "region":
            pixels = _decode_region(image, header, want)
        else:
            whole = _decode_whole(image, header, want.eighths)
            pixels = whole[want.top : want.top + want.height, want.left : want.left + want.width]
    except ValueError as error:
        raise _bad(error) from error
    return pixels if header.channels == 3 else _without_ink(pixels)


def check_jpeg(image: Encoded, header: JpegHeader) -> None:
    """Read all of a JPEG, at an eighth of its size where that is enough to see damage.

    Raises:
        BadImage: truncated or damaged anywhere.
    """
    try:
        _decode_whole(image, header, 1)
    except ValueError as error:
        raise _bad(error) from error


def _bad(error: ValueError) -> BadImage:
    is_short = any(words in str(error) for words in _PREMATURE)
    return BadImage("truncated" if is_short else "damaged", one_line(error))


def _decode_region(image: Encoded, header: JpegHeader, want: Rectangle) -> Pixels:
    pixels = np.empty((want.height, want.width, header.channels), dtype=np.uint8)
    _jpeg.decode_region(
        image,
        pixels,
        want.left,
        want.top,
        want.width,
        want.height,
        want.eighths,
        header.channels,
    )
    return pixels


def _decode_whole(image: Encoded, header: JpegHeader, eighths: int) -> Pixels:
    content = bytes(image)
    if content.count(b"\xff\xda") > _MAX_SCANS:
        raise ValueError("too many scans")
    if content.rfind(b"\xff\xd9", content.find(b"\xff\xda")) < 0:
        raise ValueError("Premature end of JPEG file")
    size = header.scaled(eighths)
    pixels: Pixels = simplejpeg.decode_jpeg(
        image,
        "CMYK" if header.channels == 4 else "RGB",
        min_width=size.width,
        min_height=size.height,
        min_factor=8 // eighths,
        strict=True,
    )
    return pixels


def _without_ink(pixels: Pixels) -> Pixels:
    # Adobe stores CMYK inverted, and nobody else writes it: 255 is no ink, black multiplies.
    product = pixels[..., :3].astype(np.uint16) * pixels[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


_START_OF_SCAN = 0xDA


def read_orientation(image: Encoded) -> int:
    """Return a JPEG's EXIF orientation (1 where there is none) from the segments in front."""
    at = 2
    while at + 4 <= len(image) and image[at] == 0xFF and image[at + 1] != _START_OF_SCAN:
        if image[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(image[at + 2 : at + 4], "big")
        tiff = at + 4 + len(_EXIF_HEADER)
        if image[at + 1] == 0xE1 and image[at + 4 : tiff] == _EXIF_HEADER:
            return _tiff_orientation(image[tiff:end])
        at = end
    return 1


def _tiff_orientation(tiff: Encoded) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
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


def _find_decoder() -> Literal["region", "whole"]:
    """Bind the C module to Pillow's libjpeg-turbo; use it only if it decodes as simplejpeg does."""
    if not _IS_BUILT:
        return "whole"
    pixels = np.arange(40 * 48 * 3, dtype=np.uint32).reshape(40, 48, 3).astype(np.uint8)
    image = simplejpeg.encode_jpeg(pixels, colorsubsampling="420")
    header, want = JpegHeader(48, 40, "YCbCr"), Rectangle(17, 5, 20, 30)
    wanted = _decode_whole(image, header, 8)[5:35, 17:37]
    package = Path(PIL.__file__).parent
    for path in (*package.parent.glob("pillow.libs/libjpeg*"), *package.glob(".dylibs/libjpeg*")):
        with contextlib.suppress(OSError, ValueError):
            _jpeg.bind(str(path))
            if np.array_equal(_decode_region(image, header, want), wanted):
                return "region"
    return "whole"


DECODER: Literal["region", "whole"] = _find_decoder()
"""How JPEGs are decoded in this process: only what is shown, or the whole."""
