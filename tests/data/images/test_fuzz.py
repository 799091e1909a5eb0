"""A few thousand mutants of `jobs/fuzz_decode.py`, what it reports, and bombs (R37, R38)."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.data.images.bad import REASONS

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "jobs"))
import fuzz_decode

JOBS = Path(fuzz_decode.__file__).parent

BOMBS = """
import io, struct, sys, zlib
import numpy as np
from PIL import Image
sys.path.insert(0, {jobs!r})
from fuzz_decode import corpus, encoded, peak_mib, picture
from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image
from orchestrator.data.images.crop import center_crop
from orchestrator.data.images.decode import decode, read_size

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content))

def jpeg(side, **options):
    image = encoded(picture(64, 64), "JPEG", **options)
    at = max(image.find(b"\\xff\\xc0"), image.find(b"\\xff\\xc2")) + 5
    return image[:at] + struct.pack(">HH", side, side) + image[at + 4:]

def png(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return (b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b""))

def gif(side):
    image = encoded(picture(9, 9), "GIF")
    return image[:6] + struct.pack("<HH", side, side) + image[10:]

def webp(side):
    image = encoded(picture(9, 9), "WEBP", lossless=True)
    at = image.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", image, at)[0] & ~((1 << 28) - 1)
    return image[:at] + struct.pack("<I", bits | (side - 1) | (side - 1) << 14) + image[at + 4:]

def tiff(side):
    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, "TIFF", compression="tiff_deflate")
    image = buffer.getvalue()
    for tag in (256, 257, 278):
        for order in (3, 4):
            at = image.find(struct.pack("<HHI", tag, order, 1))
            if at >= 0:
                image = image[:at] + struct.pack("<HHII", tag, 4, 1, side) + image[at + 12:]
    return image

def look(image):
    for see in (
        lambda: read_size(image),
        lambda: decode(image, np.empty((224, 224, 3), np.uint8),
                       lambda w, h: center_crop(w, h, 0.875)),
        lambda: check_image(image),
    ):
        try:
            see()
        except BadImage as error:
            reasons.append(error.reason)

reasons = []
for image in corpus().values():
    look(image)
assert reasons == []
before = peak_mib()
for side in (9_000, 16_000, 60_000):
    for image in (jpeg(side), jpeg(side, progressive=True), png(side), gif(side),
                  webp(min(side, 16_000)), tiff(side)):
        for _ in range(3):
            seen = len(reasons)
            look(image)
            assert len(reasons) == seen + 3, (side, image[:12], reasons[seen:])
print(sorted(set(reasons)), peak_mib() - before)
whole = np.ones((6000, 6000, 3), dtype=np.uint8)
assert peak_mib() - before > 80, "the measurement does not see memory"
"""


def test_mutants_end_as_pixels_or_as_bad_images() -> None:
    found = fuzz_decode.fuzz(3000, seed=7)
    assert found.wrong == []
    assert sum(found.said.values()) == 3000
    assert set(found.said) <= {*REASONS, "shown"}
    assert found.said["shown"] > 300
    assert found.said["damaged"] > 1000
    assert 20 < found.peak_mib < 200


def test_mutants_are_the_same_for_the_same_numbers() -> None:
    images = fuzz_decode.corpus()
    again = fuzz_decode.corpus()
    for index in range(60):
        assert fuzz_decode.mutant(images, 3, index) == fuzz_decode.mutant(again, 3, index)
    assert fuzz_decode.mutant(images, 3, 0) != fuzz_decode.mutant(images, 4, 0)


def test_a_crash_a_hang_and_a_wrong_exception_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, signal, sys, time\n"
        "for i in range(int(sys.argv[-2]), int(sys.argv[-1])):\n"
        "    os.write(1, b'%d\\n' % i)\n"
        "    if i == 3: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if i == 5: time.sleep(60)\n"
        "    said = 'KeyError: x' if i == 7 else 'shown'\n"
        "    line = {'at': i, 'kind': 'x', 'said': said, 's': 2.0 if i == 8 else 0.1, 'mib': 9}\n"
        "    os.write(1, json.dumps(line).encode() + b'\\n')\n"
    )
    monkeypatch.setattr(fuzz_decode, "SILENCE_S", 1.0)
    found = fuzz_decode.fuzz(10, seed=0, script=str(script))
    starts = [wrong.split()[0].rstrip(":") for wrong in found.wrong]
    assert starts == ["3", "5", "7", "8"]
    assert "-11" in found.wrong[0]
    assert "KeyError" in found.wrong[2]
    assert found.said == {"shown": 7, "KeyError": 1, "killed": 2}


def test_bombs_cost_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOMBS.format(jobs=str(JOBS))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reasons, mib = done.stdout.strip().rsplit(" ", 1)
    assert "too_many_pixels" in reasons
    assert int(mib) <= 50, done.stdout
