"""Odd but valid images equal Pillow's reading of them; each bad one has its reason (R34)."""

import base64
import io
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image, ImageOps

from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image
from orchestrator.data.images.crop import Crop
from orchestrator.data.images.decode import decode, read_size

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "jobs"))
from fuzz_decode import ARITHMETIC, encoded

Pixels = npt.NDArray[np.uint8]
WIDTH, HEIGHT = 203, 151


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 31) + np.cos(y / 23), np.sin((x + y) / 41), np.cos(x * y / 9000)]
    pixels = np.stack(waves, axis=-1) * 60 + 120 + (x / width * 40)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def noise() -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def shown(image: bytes, crop: Crop, side: int) -> Pixels:
    out = np.empty((side, side, 3), dtype=np.uint8)
    decode(image, out, lambda width, height: crop)
    return out


def expected(image: bytes, crop: Crop, side: int) -> Pixels:
    """What Pillow shows: its own decoder, orientation, crop and bilinear filter."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    found = upright.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(ImageOps.mirror(found) if crop.flip else found)


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encoded(picture(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else lossless))


def sampled(sampling: str) -> bytes:
    return simplejpeg.encode_jpeg(np.asarray(picture()), quality=95, colorsubsampling=sampling)


FRAMES = {"save_all": True, "append_images": [picture().rotate(180)]}
VALID = {
    "png named .JPEG": encoded(picture(), "PNG"),
    "palette": encoded(picture().quantize(64), "PNG"),
    "palette with transparency": encoded(picture().quantize(64), "PNG", transparency=3),
    "grey": encoded(picture().convert("L"), "PNG"),
    "grey and alpha": encoded(picture().convert("LA"), "PNG"),
    "alpha": encoded(picture().convert("RGBA"), "PNG"),
    "one bit": encoded(picture().convert("1"), "PNG"),
    "webp": encoded(picture(), "WEBP", quality=90),
    "lossless webp": encoded(picture(), "WEBP", lossless=True),
    "webp with alpha": encoded(picture().convert("RGBA"), "WEBP", lossless=True),
    "animated gif": encoded(picture(), "GIF", **FRAMES),
    "animated webp": encoded(picture(), "WEBP", lossless=True, **FRAMES),
    "animated png": encoded(picture(), "PNG", **FRAMES),
    "tiff of two pages": encoded(picture(), "TIFF", **FRAMES),
    "bmp": encoded(picture(), "BMP"),
    "grey jpeg": encoded(picture().convert("L"), "JPEG", quality=95),
    "cmyk jpeg": encoded(picture().convert("CMYK"), "JPEG", quality=95),
    "progressive jpeg": encoded(picture(), "JPEG", quality=95, progressive=True),
    "restart markers": encoded(picture(), "JPEG", quality=95, restart_marker_blocks=3),
    "bytes behind the end": encoded(picture(), "JPEG", quality=95) + b"\0" * 9000,
    **{f"{sampling} jpeg": sampled(sampling) for sampling in ("444", "422", "420", "440", "411")},
    **{f"turned {n} {k}": turned(n, k) for n in range(1, 9) for k in ("JPEG", "PNG", "WEBP")},
}


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe segment says that its inks are stored as YCC and K."""
    image = VALID["cmyk jpeg"]
    at = image.index(b"Adobe") + 11
    return image[:at] + b"\x02" + image[at + 1 :]


VALID["ycck jpeg"] = ycck()


@pytest.mark.parametrize("name", VALID)
def test_valid_images_equal_pillow(name: str) -> None:
    image = VALID[name]
    check_image(image)
    size = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).size
    for crop, side in (
        (Crop(0, 0, *size, False), 96),
        (Crop(0, 0, 75, 60, False), 64),
        (Crop(size[0] - 90, size[1] - 110, 90, 110, True), 64),
        (Crop(31, 17, 64, 64, False), 64),
        (Crop(size[0] - 33, 0, 33, size[1], True), 48),
    ):
        found, wanted = shown(image, crop, side), expected(image, crop, side)
        difference = np.abs(found.astype(int) - wanted)
        # A dithered picture is nothing but aliasing: the filters differ there and nowhere else.
        mean, most = (12, 100) if name == "one bit" else (1.5, 40)
        assert difference.mean() <= mean, (crop, side)
        assert difference.max() <= most, (crop, side)


@pytest.mark.parametrize("mode", ["grey", "colour"])
def test_sixteen_bits_keep_their_high_byte(mode: str) -> None:
    pixels = np.asarray(picture())[..., 0] if mode == "grey" else np.asarray(picture())[..., ::-1]
    wide = cv2.imencode(".png", pixels.astype(np.uint16) * 256 + 77)[1].tobytes()
    narrow = encoded(picture() if mode == "colour" else Image.fromarray(pixels), "PNG")
    check_image(wide)
    crop = Crop(10, 20, 64, 64, False)
    np.testing.assert_array_equal(shown(wide, crop, 64), shown(narrow, crop, 64))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (1, 900), (900, 1), (3, 2), (17, 33)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_odd_sizes(kind: str, size: tuple[int, int]) -> None:
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    image = encoded(picture().resize(size), kind, **options)
    check_image(image)
    assert (read_size(image).width, read_size(image).height) == size
    crop = Crop(0, 0, *size, False)
    difference = np.abs(shown(image, crop, 16).astype(int) - expected(image, crop, 16))
    assert difference.mean() <= 12  # 900 to 16 is an area mean here, a triangle's at Pillow
    last = Crop(size[0] - 1, size[1] - 1, 1, 1, True)
    pixel = expected(image, last, 4)
    assert np.abs(shown(image, last, 4).astype(int) - pixel).max() <= 2


def test_arithmetic_coding() -> None:
    image = base64.b64decode(ARITHMETIC)
    check_image(image)
    crop = Crop(0, 0, 16, 16, False)
    y, x = np.mgrid[:16, :16]
    wanted = np.stack([x * 16, y * 16, (x + y) * 8], axis=-1)
    assert np.abs(shown(image, crop, 16).astype(int) - wanted).mean() < 6


def jpeg_size(image: bytes, width: int, height: int) -> bytes:
    at = image.index(b"\xff\xc0") + 5
    return image[:at] + struct.pack(">HH", height, width) + image[at + 4 :]


def png_size(width: int, height: int) -> bytes:
    image = encoded(picture(), "PNG")
    header = image[12:16] + struct.pack(">II", width, height) + image[24:29]
    return image[:12] + header + struct.pack(">I", zlib.crc32(header)) + image[33:]


def blanked(image: bytes) -> bytes:
    middle, size = len(image) // 2, len(image) // 8
    return image[:middle] + bytes(size) + image[middle + size :]


SMALL = encoded(picture(), "JPEG")
NOISE = {kind: encoded(noise(), kind) for kind in ("JPEG", "PNG", "GIF")}
BAD = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", "not_an_image"),
    "zeros": (bytes(5000), "not_an_image"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "not_an_image"),
    "truncated jpeg": (NOISE["JPEG"][:-9000], "truncated"),
    "jpeg without its last byte": (NOISE["JPEG"][:-1], "truncated"),
    "truncated png": (NOISE["PNG"][:-9000], "truncated"),
    "zeros in a png": (blanked(NOISE["PNG"]), "damaged"),
    "zeros in a gif": (blanked(NOISE["GIF"]), "damaged"),
    "no height": (jpeg_size(SMALL, 203, 0), "damaged"),
    "no columns": (png_size(0, 151), "no_pixels"),
    "no rows": (png_size(203, 0), "no_pixels"),
    "no width": (jpeg_size(SMALL, 0, 151), "damaged"),
    "png bomb": (png_size(60_000, 60_000), "too_many_pixels"),
    "png bomb below the limit": (png_size(9_000, 9_000), "too_many_pixels"),
    "jpeg bomb": (jpeg_size(SMALL, 65_000, 65_000), "too_many_pixels"),
    "jpeg bomb below the limit": (jpeg_size(SMALL, 9_000, 9_000), "too_many_pixels"),
    "too thin": (encoded(Image.new("L", (2001, 2)), "PNG"), "too_thin"),
    "half a header": (SMALL[:100], "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_have_a_reason_that_stays(name: str) -> None:
    image, reason = BAD[name]
    for crop in (Crop(0, 0, 1, 1, False), Crop(0, 0, 203, 151, False)):
        with pytest.raises(BadImage) as caught:
            shown(image, crop, 16)
        assert caught.value.reason == reason, caught.value
    with pytest.raises(BadImage) as caught:
        check_image(image)
    assert caught.value.reason == reason, caught.value
    assert "\n" not in caught.value.detail


def test_zeros_in_a_jpeg_are_found_by_the_check() -> None:
    """They decode as grey blocks: only the surplus of data at the end gives them away."""
    with pytest.raises(BadImage, match="damaged"):
        check_image(blanked(NOISE["JPEG"]))
