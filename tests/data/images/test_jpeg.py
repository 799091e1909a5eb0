"""Rectangles of JPEGs are those of a whole decode, to the last bit, and as strictly decoded."""

import io
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from orchestrator.data.images import jpeg
from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image
from orchestrator.data.images.crop import Crop
from orchestrator.data.images.decode import decode
from orchestrator.data.images.jpeg import JpegHeader, Rectangle, decode_rectangle, read_header

SOURCE = Path(jpeg.__file__).with_name("_jpeg.c")
Pixels = npt.NDArray[np.uint8]


def photograph(width: int = 203, height: int = 151) -> Pixels:
    random = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x * y) % 256], axis=-1)
    return (smooth + random.normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def pillow_jpeg(pixels: Pixels, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


JPEGS = {
    "grey": pillow_jpeg(photograph(), "L"),
    "progressive": pillow_jpeg(photograph(), progressive=True),
    "restart": pillow_jpeg(photograph(), restart_marker_rows=1),
    "cmyk": pillow_jpeg(photograph(), "CMYK"),
    "small": simplejpeg.encode_jpeg(photograph(3, 2)),
    "pixel": simplejpeg.encode_jpeg(photograph(1, 1)),
    "column": simplejpeg.encode_jpeg(photograph(1, 70)),
    "row": simplejpeg.encode_jpeg(photograph(70, 1)),
} | {
    sampling: simplejpeg.encode_jpeg(photograph(), colorsubsampling=sampling)
    for sampling in ("444", "422", "420", "440", "411")
}


def test_the_c_module_is_built_where_it_can_be() -> None:
    """CI has a compiler: a build that silently failed would only be slow."""
    assert jpeg.DECODER == "region"


def test_the_c_module_compiles_without_a_warning(tmp_path: Path) -> None:
    include = sysconfig.get_paths()["include"]
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared", "-I", include]
    command = ["cc", *flags, str(SOURCE), "-o", str(tmp_path / "_jpeg.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rectangles(width: int, height: int, seed: int) -> list[Rectangle]:
    """Some at every edge and some anywhere."""
    random = np.random.default_rng(seed)
    found = [Rectangle(0, 0, width, height), Rectangle(width - 1, height - 1, 1, 1)]
    found += [Rectangle(0, 0, 1, height), Rectangle(0, height - 1, width, 1)]
    for _ in range(40):
        left, top = int(random.integers(width)), int(random.integers(height))
        w, h = int(random.integers(1, width - left + 1)), int(random.integers(1, height - top + 1))
        found.append(Rectangle(left, top, w, h))
    return found


@pytest.mark.parametrize("eighths", [1, 2, 4, 8])
@pytest.mark.parametrize("name", JPEGS)
def test_a_rectangle_equals_that_of_the_whole(
    name: str, eighths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = JPEGS[name]
    header = read_header(image)
    assert header is not None
    if max(header.width, header.height) <= 8:
        eighths = 8  # simplejpeg takes any scale that gives the same sides
    size = header.scaled(eighths)
    for place in rectangles(size.width, size.height, seed=eighths):
        want = Rectangle(place.left, place.top, place.width, place.height, eighths)
        monkeypatch.setattr(jpeg, "DECODER", "region")
        found = decode_rectangle(image, header, want)
        monkeypatch.setattr(jpeg, "DECODER", "whole")
        np.testing.assert_array_equal(found, decode_rectangle(image, header, want))


def test_the_scale_is_the_smallest_that_is_fine_enough() -> None:
    header = JpegHeader(500, 375, "YCbCr")
    assert header.eighths(min_width=500, min_height=375) == 8
    assert header.eighths(min_width=251, min_height=10) == 8
    assert header.eighths(min_width=250, min_height=188) == 4
    assert header.eighths(min_width=125, min_height=94) == 2
    assert header.eighths(min_width=1, min_height=1) == 1


@pytest.mark.parametrize("decoder", ["region", "whole"])
def test_a_missing_end_is_bad_whatever_the_crop_shows(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jpeg, "DECODER", decoder)
    out = np.empty((8, 8, 3), dtype=np.uint8)
    for name, image in JPEGS.items():
        shares = (0.4, 0.9) if len(image) > 2000 else ()  # not in the header
        for length in (len(image) - 1, len(image) - 2, *(int(len(image) * s) for s in shares)):
            with pytest.raises(BadImage) as caught:
                decode(image[:length], out, lambda width, height: Crop(0, 0, 1, 1, False))
            assert caught.value.reason == "truncated", name


def test_bytes_behind_the_end_are_no_damage() -> None:
    for trailer in (b"\0" * 5000, b"MotionPhoto_Data" * 1000, JPEGS["420"]):
        image = JPEGS["420"] + trailer
        header = read_header(image)
        assert header is not None
        whole = Rectangle(0, 0, header.width, header.height)
        wanted = decode_rectangle(JPEGS["420"], header, whole)
        np.testing.assert_array_equal(decode_rectangle(image, header, whole), wanted)
        check_image(image)


def test_damage_above_the_crop_is_seen_and_below_it_by_the_check_alone() -> None:
    image = bytearray(JPEGS["restart"])
    at = image.index(b"\xff\xd3") + 1  # the fourth of ten rows of blocks ends here
    image[at] = 0xD6
    header = read_header(bytes(image))
    assert header is not None
    decode_rectangle(bytes(image), header, Rectangle(0, 0, 100, 30))
    with pytest.raises(BadImage, match="damaged"):
        decode_rectangle(bytes(image), header, Rectangle(0, 100, 100, 30))
    with pytest.raises(BadImage, match="damaged"):
        check_image(bytes(image))


def test_scans_without_end_are_refused() -> None:
    image = JPEGS["progressive"]
    at = image.rindex(b"\xff\xda")
    endless = image[:at] + image[at:-2] * 200 + image[-2:]
    for look in (
        check_image,
        lambda image: decode(
            image, np.empty((8, 8, 3), np.uint8), lambda w, h: Crop(0, 0, w, h, 0)
        ),
    ):
        with pytest.raises(BadImage, match="damaged"):
            look(endless)


def test_any_kind_of_bytes_will_do() -> None:
    found = []
    image = JPEGS["progressive"]
    for kind in (bytes, bytearray, memoryview):
        out = np.empty((16, 16, 3), dtype=np.uint8)
        decode(kind(image), out, lambda width, height: Crop(0, 0, width, height, True))
        found.append(out)
        check_image(kind(image))
    assert all(np.array_equal(found[0], other) for other in found)


def test_arguments_that_do_not_agree_write_nothing() -> None:
    image, out = JPEGS["420"], np.zeros((10, 10, 3), dtype=np.uint8)
    for arguments in (
        (0, 0, 11, 10, 8, 3),
        (0, 0, 10, 10, 9, 3),
        (0, 0, 10, 10, 8, 4),
        (2**31, 0, 10, 10, 8, 3),
    ):
        with pytest.raises(RuntimeError, match="do not agree"):
            jpeg._jpeg.decode_region(image, out, *arguments)
    for left, top in ((194, 0), (0, 142), (60_000, 60_000)):
        with pytest.raises(ValueError, match="outside"):
            jpeg._jpeg.decode_region(image, out, left, top, 10, 10, 8, 3)
    assert not out.any()


def test_another_library_than_libjpeg_is_refused() -> None:
    with pytest.raises(OSError, match="not libjpeg"):
        jpeg._jpeg.bind(jpeg._jpeg.__file__)
    with pytest.raises(OSError, match="nowhere"):
        jpeg._jpeg.bind("nowhere.so")
    test_any_kind_of_bytes_will_do()
