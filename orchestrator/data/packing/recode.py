"""Smaller images at pack time: a longest side and a JPEG quality. Pure."""

import dataclasses
import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image

# Visually the same, at about half of what cameras write.
_USUAL_QUALITY = 90
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Recode:
    """What images are made into."""

    max_side: int
    """Longest side in pixels; 0: as it is."""
    quality: int
    """JPEG quality, 1 to 100; 0: only images that are too large are encoded again."""

    def apply(self, image: bytes, *, width: int, height: int) -> bytes:
        """Return an image that is no larger, as JPEG, or the very bytes where that saves nothing.

        The EXIF orientation is applied, and everything but the pixels dropped.

        Raises:
            BadImage: it cannot be decoded.
        """
        factor = max(width, height) / self.max_side if self.max_side else 0.0
        if factor <= 1 and not self.quality:
            return image
        check_image(image)
        pixels = _upright(image)
        if factor > 1:
            size = (
                max(1, round(pixels.shape[1] / factor)),
                max(1, round(pixels.shape[0] / factor)),
            )
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        smaller: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), self.quality or _USUAL_QUALITY, "RGB", "420"
        )
        return smaller if factor > 1 or len(smaller) < len(image) else image


def _upright(image: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return RGB pixels, uint8, shape (H, W, 3)."""
    with Image.open(io.BytesIO(image)) as opened:
        mode, turn = opened.mode, opened.getexif().get(_ORIENTATION, 1)
        if mode in ("RGB", "L", "CMYK"):
            pixels = opened.convert("RGB")
            return np.asarray(pixels.transpose(_TURNS[turn]) if turn in _TURNS else pixels)
    # Palettes, transparency and 16 bits: OpenCV scales what Pillow would clip.
    found = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
    if found is None:
        raise BadImage("damaged", f"OpenCV cannot decode this {mode} image")
    return np.asarray(found, dtype=np.uint8)
