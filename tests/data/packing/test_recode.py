import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from orchestrator.data.images.bad import BadImage
from orchestrator.data.packing.recode import Recode


def encoded(size=(60, 40), kind="JPEG", mode="RGB", **options):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize(size).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(image):
    with Image.open(io.BytesIO(image)) as found:
        found.load()
        return found


def recoded(image, *, max_side=0, quality=0):
    found = opened(image)
    return Recode(max_side, quality).apply(image, width=found.width, height=found.height)


def test_small_images_keep_their_very_bytes():
    image = encoded()
    assert recoded(image, max_side=60) is image
    assert recoded(image) is image


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_images_get_the_longest_side(mode):
    image = encoded((600, 400), mode=mode, quality=95)
    smaller = opened(recoded(image, max_side=300))
    assert (smaller.size, smaller.format, smaller.mode) == ((300, 200), "JPEG", "RGB")
    expected = np.asarray(opened(image).convert("RGB").resize((300, 200)), np.float64)
    assert np.abs(np.asarray(smaller, np.float64) - expected).mean() < 4


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_exif_orientation_is_applied(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    image = encoded((600, 400), quality=95, exif=exif)
    smaller = opened(recoded(image, max_side=300))
    assert smaller.size == ((300, 200) if turn < 5 else (200, 300))
    assert 0x0112 not in smaller.getexif()
    upright = ImageOps.exif_transpose(opened(image)).resize(smaller.size)
    assert np.abs(np.asarray(smaller, np.float64) - np.asarray(upright, np.float64)).mean() < 4


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")])
def test_other_formats_become_jpeg(kind, mode):
    smaller = opened(recoded(encoded((600, 400), kind, mode), max_side=300))
    assert (smaller.size, smaller.mode) == ((300, 200), "RGB")


def test_a_quality_is_used_only_where_it_saves():
    image = encoded((600, 400), quality=100)
    assert len(recoded(image, quality=50)) < len(image) / 2
    small = encoded((600, 400), quality=10)
    assert recoded(small, quality=95) is small


def test_a_truncated_image_is_bad():
    image = encoded((600, 400))
    with pytest.raises(BadImage, match="truncated"):
        Recode(300, 0).apply(image[:-300], width=600, height=400)
