"""What an image's first bytes promise, and which promises are refused. Pure.

A header may promise far more than the machine's memory in a few bytes, so everything here is
checked before anything is decoded.
"""

import io
import struct
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

from orchestrator.data.images.bad import BadImage, one_line
from orchestrator.data.images.crop import Size

Encoded = bytes | bytearray | memoryview

# Pillow's own warning bound: a quarter of a GiB of RGB is the most that one image may cost.
MAX_PIXELS = 178_956_970 // 2
# Fifty times the thinnest panorama: nothing of it is left when it is made square.
MAX_ASPECT = 1000
# Above 12 MB of RGB an image must bring some bytes for its pixels. The emptiest JPEG holds 512
# pixels in a byte and a white 8-bit PNG 1032; a bomb of 65000 x 65000 in 30 kB held 140,000.
MAX_PIXELS_PER_BYTE = 1032
_FREE_PIXELS = 4_000_000

JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def checked(size: Size, num_bytes: int) -> Size:
    """Return the size if it is one that may be decoded.

    Raises:
        BadImage: no_pixels, too_many_pixels or too_thin.
    """
    pixels = size.width * size.height
    found = f"the header says {size.width} x {size.height} pixels"
    if size.width < 1 or size.height < 1:
        raise BadImage("no_pixels", found)
    if pixels > MAX_PIXELS:
        raise BadImage("too_many_pixels", f"{found}, more than {MAX_PIXELS}")
    if pixels > max(_FREE_PIXELS, MAX_PIXELS_PER_BYTE * num_bytes):
        raise BadImage("too_many_pixels", f"{found}, which {num_bytes} bytes cannot hold")
    longer, shorter = max(size.width, size.height), min(size.width, size.height)
    if longer > MAX_ASPECT * shorter:
        raise BadImage("too_thin", f"{found}, thinner than {MAX_ASPECT}:1")
    return size


def read_other_size(image: Encoded) -> Size:
    """Return the sides that the header of anything but a common JPEG names.

    Raises:
        BadImage: it is no image, or its header cannot be read.
    """
    if not image:
        raise BadImage("empty", "there are no bytes")
    if image[: len(_PNG_START)] == _PNG_START:
        return _read_png_size(memoryview(image))
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(image)) as opened:
            return Size(opened.width, opened.height)
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", one_line(error)) from error
    except UnidentifiedImageError as error:
        start = bytes(image[:8])
        known = start.startswith((JPEG_START, _PNG_START[:8]))
        reason = "damaged" if known else "not_an_image"
        raise BadImage(reason, f"no image format is known for {start!r}...") from error
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's plugins raise whatever a damaged header makes them stumble over.
        raise BadImage("damaged", one_line(error)) from error


def _read_png_size(image: memoryview) -> Size:
    """Return what the header says, once every chunk that matters is known to be there and sound.

    OpenCV believes the length that a chunk claims and allocates up to 4 GB for it, and it returns
    what it could decode of pixels whose checksum is wrong.
    """
    at, kind, wrong = len(_PNG_START) - 8, b"", False
    while kind != b"IEND":
        if at + 12 > len(image):
            raise BadImage("truncated", f"the PNG ends after its chunk {kind.decode('latin-1')!r}")
        length, kind = struct.unpack_from(">I4s", image, at)
        end = at + 8 + length
        if end + 4 > len(image):
            raise BadImage("truncated", f"the PNG ends in its chunk {kind.decode('latin-1')!r}")
        is_critical = kind[:1].isupper()
        if is_critical and zlib.crc32(image[at + 4 : end]) != int.from_bytes(image[end : end + 4]):
            wrong = True
        at = end + 4
    if wrong:
        raise BadImage("damaged", "a PNG chunk's checksum is wrong")
    width, height = struct.unpack_from(">II", image, len(_PNG_START))
    return Size(width, height)
