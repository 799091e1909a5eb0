"""Decoding against Pillow as the second opinion, and against damage."""

import dataclasses
import io
import pickle
import struct
import zlib

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from orchestrator.data.images.bad import REASONS, BadImage
from orchestrator.data.images.crop import Crop
from orchestrator.data.images.decode import decode, read_size
from orchestrator.data.images.header import MAX_PIXELS

WIDTH, HEIGHT = 96, 64
Pixels = npt.NDArray[np.uint8]


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A smooth colour picture without symmetry, so that every turn of it looks different."""
    y, x = np.mgrid[:height, :width]
    red = x * 255 / width
    green = 255 * np.exp(-((5 * x / width - 1) ** 2) - (4 * y / height - 1) ** 2)
    blue = y * 255 / height
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole(width: int, height: int) -> Crop:
    return Crop(0, 0, width, height, False)


def shown(image: bytes, side: int = 32, crop: Crop | None = None) -> Pixels:
    out = np.full((side, side, 3), 7, dtype=np.uint8)
    decode(image, out, whole if crop is None else lambda width, height: crop)
    return out


def expected(image: Image.Image, side: int = 32, crop: Crop | None = None) -> Pixels:
    crop = crop or whole(*image.size)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    part = np.asarray(image.convert("RGB").crop(box))
    return cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA)


def assert_close(found: Pixels, wanted: Pixels, *, mean: float, most: float) -> None:
    difference = np.abs(found.astype(int) - wanted)
    assert difference.mean() <= mean
    assert difference.max() <= most


def reason_of(image: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        shown(image)
    assert "\n" not in str(caught.value)
    return caught.value.reason


LOSSLESS = {
    "png": encoded(picture(), "PNG"),
    "grey png": encoded(picture().convert("L"), "PNG"),
    "palette png": encoded(picture().quantize(64), "PNG"),
    "one-bit png": encoded(picture().convert("1"), "PNG"),
    "rgba png": encoded(picture().convert("RGBA"), "PNG"),
    "grey and alpha png": encoded(picture().convert("LA"), "PNG"),
    "webp": encoded(picture(), "WEBP", lossless=True),
    "bmp": encoded(picture(), "BMP"),
    "gif": encoded(picture(), "GIF"),
    "tiff": encoded(picture(), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_equal_pillow(name: str) -> None:
    wanted = expected(Image.open(io.BytesIO(LOSSLESS[name])))
    np.testing.assert_array_equal(shown(LOSSLESS[name]), wanted)


def test_sixteen_bits_keep_their_high_byte() -> None:
    wide = np.arange(WIDTH * HEIGHT, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 10
    image = encoded(Image.fromarray(wide.astype(np.uint16)), "PNG")
    wanted = expected(Image.fromarray((wide >> 8).astype(np.uint8)))
    assert_close(shown(image), wanted, mean=1, most=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_modes(mode: str, progressive: bool) -> None:
    image = encoded(picture().convert(mode), "JPEG", quality=95, progressive=progressive)
    assert_close(shown(image), expected(Image.open(io.BytesIO(image))), mean=1, most=8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_equals_pillow(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(picture(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    crop = Crop(3, 9, 58, 50, False)
    found = shown(image, side=24, crop=crop)
    assert_close(found, expected(upright, side=24, crop=crop), mean=2, most=24)
    flipped = shown(image, side=24, crop=dataclasses.replace(crop, flip=True))
    np.testing.assert_array_equal(flipped, found[:, ::-1])


def test_big_endian_exif_and_damaged_exif() -> None:
    def turned(tiff: bytes) -> bytes:
        payload = b"Exif\0\0" + tiff
        segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
        return plain[:2] + segment + plain[2:]

    plain = encoded(picture(64, 64), "JPEG", quality=95)
    motorola = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 3, 0)
    np.testing.assert_array_equal(shown(turned(motorola)), shown(plain)[::-1, ::-1])
    for damaged in (
        motorola[:14],
        b"II*\0\xff\xff\xff\x7f",
        b"",
        motorola.replace(b"\3\0\0", b"9\0\0"),
    ):
        np.testing.assert_array_equal(shown(turned(damaged)), shown(plain))


@pytest.mark.parametrize("side", [24, 40, 90])
def test_scaled_jpeg_is_close_to_a_full_decode(side: int) -> None:
    image = encoded(picture(501, 377), "JPEG", quality=95)
    crop = Crop(31, 57, 403, 299, False)
    full = expected(Image.open(io.BytesIO(image)), side=side, crop=crop)
    assert_close(shown(image, side=side, crop=crop), full, mean=2, most=8)


@pytest.mark.parametrize("factor", [0.4, 0.9, 1.0, 1.3, 1.7, 1.98, 2.0, 3.3])
def test_resizing_is_close_to_pillow_without_aliasing(factor: float) -> None:
    noise = np.random.default_rng(0).normal(0, 12, (100, 100, 3)) + np.asarray(picture(100, 100))
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    side = round(100 / factor)
    wanted = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    assert_close(shown(encoded(image, "PNG"), side=side), wanted, mean=3, most=25)


def test_one_side_may_shrink_while_the_other_grows() -> None:
    stripes = np.zeros((96, 16, 3), dtype=np.uint8)
    stripes[::2] = 200
    found = shown(encoded(Image.fromarray(stripes), "PNG"), side=32)
    assert_close(found, np.full_like(found, 100), mean=35, most=40)
    coarse = shown(encoded(Image.fromarray(stripes.transpose(1, 0, 2)), "PNG"), side=24)
    assert_close(coarse, np.full_like(coarse, 100), mean=1, most=1)


def test_a_small_crop_is_enlarged() -> None:
    found = shown(LOSSLESS["png"], crop=Crop(90, 60, 3, 2, False))
    corner = np.asarray(picture())[60:62, 90:93]
    assert found.min() >= corner.min()
    assert found.max() <= corner.max()


def test_the_format_is_told_by_content() -> None:
    assert reason_of(b"this is a caption, not a photograph") == "not_an_image"
    assert reason_of(b"") == "empty"
    assert reason_of(b"\xff\xd8\xff\xe0") == "damaged"
    assert reason_of(b"\0" * 1000) == "not_an_image"


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_bad(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image = encoded(Image.fromarray(noise), kind)
    reasons = {"truncated"} if kind in ("JPEG", "PNG") else {"truncated", "damaged", "not_an_image"}
    assert reason_of(image[: int(len(image) * share)]) in reasons


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IEND", b"")


def test_a_header_that_promises_too_much_is_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decoded(*arguments: object, **options: object) -> None:
        raise AssertionError("decoded an image whose header should have been refused")

    monkeypatch.setattr("orchestrator.data.images.decode.cv2.imdecode", decoded)
    monkeypatch.setattr("orchestrator.data.images.decode.decode_rectangle", decoded)
    jpeg = bytearray(encoded(picture(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    gif = LOSSLESS["gif"][:6] + struct.pack("<HH", 60_000, 60_000) + LOSSLESS["gif"][10:]
    for image in (png_header(MAX_PIXELS + 1, 1), bytes(jpeg), gif):
        assert reason_of(image) == "too_many_pixels"
    assert reason_of(png_header(9000, 9000)) == "too_many_pixels"  # 81 million in 60 bytes
    assert reason_of(png_header(0, 5)) == "no_pixels"
    assert reason_of(png_header(2002, 2)) == "too_thin"


def test_a_png_chunk_that_claims_more_than_the_file_is_refused() -> None:
    image = LOSSLESS["png"]
    at = image.index(b"IDAT") - 4
    assert reason_of(image[:at] + b"\xf0\0\0\0" + image[at + 4 :]) == "truncated"


def test_read_size_needs_no_pixels() -> None:
    for image in (encoded(picture(), "JPEG"), *LOSSLESS.values()):
        size = read_size(image)
        assert (size.width, size.height) == (WIDTH, HEIGHT)
    assert read_size(png_header(2000, 2000)).width == 2000


def test_bad_image_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "the end is missing")))
    assert (error.reason, str(error)) == ("truncated", "truncated: the end is missing")


def mutated(image: bytes, random: np.random.Generator) -> bytes:
    damaged = bytearray(image)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(0, max(1, len(damaged) - 1)))
        match random.integers(0, 4):
            case 0:
                damaged[at : at + 1] = bytes([int(random.integers(0, 256))])
            case 1:
                del damaged[at : at + int(random.integers(1, 40))]
            case 2:
                damaged[at:at] = random.bytes(int(random.integers(1, 40)))
            case _:
                del damaged[max(at, 1) :]
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_raises_bad_image_and_nothing_else(kind: str) -> None:
    random = np.random.default_rng(20)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(picture(40, 24), kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    reasons = []
    for _ in range(1000):
        out = np.zeros((16, 16, 3), dtype=np.uint8)
        try:
            decode(mutated(image, random), out, whole)
        except BadImage as error:
            reasons.append(error.reason)
    assert len(reasons) > 300
    assert set(reasons) <= set(REASONS)
