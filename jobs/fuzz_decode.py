"""Mutated images of every format through the decoder: no crash, no hang, no exception but BadImage.

    python jobs/fuzz_decode.py [--images 100000] [--seed 0]

Each mutant is shown with a random crop and checked whole, in a process of its own that is started
again behind whatever kills it. Prints what was found; exits with 1 if that is anything bad.
"""

import argparse
import base64
import collections
import dataclasses
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image
from orchestrator.data.images.crop import random_crop
from orchestrator.data.images.decode import decode
from orchestrator.data.stream import hash_key

LIMIT_S = 1.0
# A process that says nothing for this long is taken to hang; a busy machine is not.
SILENCE_S = 20.0
SIDE = 32
# 16 x 16 pixels, arithmetic coding: nothing that is installed can write it.
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwc"
    "KDcpLDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
    "MjIyMjIyMjIyMjIyMjIyMjIyMjL/yQARCAAQABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ALLx"
    "JG6C736JL/4UJQcsGXangkaxCVeyIi/tQeEw/9k="
)


def picture(width: int, height: int) -> Image.Image:
    """Return a colour picture with a gradient and some grain."""
    random = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=-1)
    grain = random.normal(0, 12, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corpus() -> dict[str, bytes]:
    """Return one sound image of every kind that the decoder knows."""
    small, large = picture(45, 29), picture(211, 140)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [small, small.rotate(180)]
    wide = (np.asarray(small).astype(np.uint16) * 257)[..., ::-1]
    images = {"arithmetic jpeg": base64.b64decode(ARITHMETIC)}
    for sampling in ("444", "422", "420", "440", "411"):
        content = simplejpeg.encode_jpeg(np.asarray(small), colorsubsampling=sampling)
        images[f"{sampling} jpeg"] = content
    for name, image, kind, options in (
        ("jpeg", large, "JPEG", {"quality": 90, "exif": exif}),
        ("progressive jpeg", large, "JPEG", {"progressive": True}),
        ("restart jpeg", large, "JPEG", {"restart_marker_rows": 1}),
        ("grey jpeg", small.convert("L"), "JPEG", {}),
        ("cmyk jpeg", small.convert("CMYK"), "JPEG", {}),
        ("png", small, "PNG", {"exif": exif}),
        ("large png", large, "PNG", {}),
        ("grey and alpha png", small.convert("LA"), "PNG", {}),
        ("palette png", small.quantize(16), "PNG", {"transparency": 3}),
        ("bit png", small.convert("1"), "PNG", {}),
        ("webp", small, "WEBP", {"exif": exif}),
        ("large webp", large, "WEBP", {}),
        ("lossless webp", small.convert("RGBA"), "WEBP", {"lossless": True}),
        ("animated webp", small, "WEBP", {"save_all": True, "append_images": frames}),
        ("gif", small, "GIF", {}),
        ("animated gif", small, "GIF", {"save_all": True, "append_images": frames}),
        ("bmp", small, "BMP", {}),
        ("palette bmp", small.quantize(16), "BMP", {}),
        ("tiff", small, "TIFF", {"exif": exif}),
        ("lzw tiff", small, "TIFF", {"compression": "tiff_lzw"}),
        ("deflate tiff", small, "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("fax tiff", small.convert("1"), "TIFF", {"compression": "group4"}),
        ("jpeg tiff", large, "TIFF", {"compression": "jpeg"}),
        ("ppm", small, "PPM", {}),
    ):
        images[name] = encoded(image, kind, **options)
    images["16-bit png"] = cv2.imencode(".png", wide)[1].tobytes()
    return images


def _flip_bits(image: bytearray, random: np.random.Generator, other: bytes) -> None:
    for at in random.integers(0, len(image), random.integers(1, 9)).tolist():
        image[at] ^= 1 << int(random.integers(8))


def _edit_header(image: bytearray, random: np.random.Generator, other: bytes) -> None:
    extremes = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
    for at in random.integers(0, min(len(image), 700), random.integers(1, 6)).tolist():
        image[at] = extremes[int(random.integers(len(extremes)))]


def _truncate(image: bytearray, random: np.random.Generator, other: bytes) -> None:
    del image[int(random.integers(0, len(image))) :]


def _splice(image: bytearray, random: np.random.Generator, other: bytes) -> None:
    start = int(random.integers(0, len(other)))
    part = other[start : start + int(random.integers(1, 200))]
    at = int(random.integers(0, len(image)))
    image[at : at + (len(part) if random.integers(2) else 0)] = part


def _delete(image: bytearray, random: np.random.Generator, other: bytes) -> None:
    at = int(random.integers(0, len(image)))
    del image[at : at + int(random.integers(1, 60))]


def _blank(image: bytearray, random: np.random.Generator, other: bytes) -> None:
    at, size = int(random.integers(0, len(image))), int(random.integers(1, 200))
    image[at : at + size] = bytes([0, 0xFF][int(random.integers(2))] for _ in image[at : at + size])


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator, bytes], None], ...] = (
    _flip_bits,
    _edit_header,
    _truncate,
    _splice,
    _delete,
    _blank,
)


def mutant(images: dict[str, bytes], seed: int, index: int) -> tuple[str, bytes]:
    """Return (name of the kind, bytes) of one mutant: the same for the same numbers."""
    random = np.random.default_rng((seed, index))
    names = list(images)
    name = names[index % len(names)]
    image = bytearray(images[name])
    for _ in range(int(random.integers(1, 4))):
        other = images[names[int(random.integers(len(names)))]]
        if image:
            MUTATIONS[int(random.integers(len(MUTATIONS)))](image, random, other)
    return name, bytes(image)


def outcome(image: bytes, key: int) -> str:
    """Return "shown", or the reason why an image is bad; anything else is raised."""
    out = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    reasons = []
    for look in (
        lambda: decode(
            image,
            out,
            lambda width, height: random_crop(
                width, height, scale=(0.08, 1), ratio=(0.75, 4 / 3), flip=0.5, key=key
            ),
        ),
        lambda: check_image(image),
    ):
        try:
            look()
        except BadImage as error:
            reasons.append(error.reason)
    if len(reasons) == 1 and not image.startswith(b"\xff\xd8\xff"):
        raise AssertionError(f"shown, but not sound, or the reverse: {reasons}")
    return reasons[0] if reasons else "shown"


def peak_mib() -> int:
    """Return the most memory this program has held; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def child(seed: int, start: int, stop: int) -> int:
    """Go through mutants [start, stop); say which one is next before it can kill this process."""
    images = corpus()
    for index in range(start, stop):
        name, image = mutant(images, seed, index)
        os.write(1, f"{index}\n".encode())
        began = time.process_time()
        try:
            said = outcome(image, hash_key(seed, index))
        except Exception as error:  # what is looked for: anything but BadImage is a finding
            said = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
        spent = time.process_time() - began
        line = {"at": index, "kind": name, "said": said, "s": round(spent, 3), "mib": peak_mib()}
        os.write(1, (json.dumps(line) + "\n").encode())
    return 0


@dataclasses.dataclass
class Found:
    """What became of the mutants."""

    said: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    slowest_s: float = 0.0
    peak_mib: int = 0

    def add(self, line: dict[str, object]) -> None:
        """Count one mutant."""
        said, spent = str(line["said"]), float(str(line["s"]))
        self.slowest_s = max(self.slowest_s, spent)
        self.peak_mib = max(self.peak_mib, int(str(line["mib"])))
        self.said[said.split(":")[0]] += 1
        if ":" in said or spent > LIMIT_S:
            self.wrong.append(f"{line['at']} ({line['kind']}): {said}, {spent} s")


def lines(process: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Yield what a child says until it ends or says nothing for too long."""
    assert process.stdout is not None
    rest = b""
    while select.select([process.stdout], [], [], SILENCE_S)[0]:
        got = os.read(process.stdout.fileno(), 1 << 16)
        if not got:
            return
        *whole, rest = (rest + got).split(b"\n")
        yield from (line.decode() for line in whole)
    process.kill()


def fuzz(images: int, seed: int, script: str = __file__) -> Found:
    """Run all mutants, starting a new process behind each that died or hung."""
    found, start = Found(), 0
    while start < images:
        command = [sys.executable, script, "--seed", str(seed), "--child", str(start), str(images)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            at, done = start, start
            for line in lines(process):
                if line.startswith("{"):
                    found.add(json.loads(line))
                    done += 1
                else:
                    at = int(line)
        if done < images:
            found.wrong.append(f"{at}: the process ended with {process.returncode}")
            found.said["killed"] += 1
        start = done if done == images else at + 1
    return found


def main(flags: list[str]) -> int:
    """Fuzz and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(flags)
    if options.child:
        return child(options.seed, *options.child)
    found = fuzz(options.images, options.seed)
    print(f"{options.images} mutants of {len(corpus())} images, seed {options.seed}:")
    for said, count in found.said.most_common():
        print(f"{count:9,d} {said}")
    print(f"slowest {found.slowest_s:.3f} s, peak memory {found.peak_mib} MiB")
    for wrong in found.wrong[:50]:
        print(f"WRONG {wrong}")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
