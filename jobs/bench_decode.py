"""CPU time of the decoder beside its alternatives, and how far each is from exact pixels.

    python jobs/bench_decode.py [--images 200] [--repeats 5] [--size 224]

All decode the same random resized crops of the same photographs (500 x 375 pixels, about 95 kB) in
turns on one core; the best pass of each counts. The error is the root mean square in grey levels
against an exact whole decode resized by Pillow's bilinear filter, so it is mostly the filter's.
"""

import argparse
import functools
import importlib.util
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from photographs import HEIGHT, WIDTH, write_photograph
from PIL import Image

from orchestrator.data.images import jpeg
from orchestrator.data.images.check import check_image
from orchestrator.data.images.crop import Crop, random_crop
from orchestrator.data.images.decode import decode
from orchestrator.data.stream import hash_key

Pixels = npt.NDArray[np.uint8]
Decoder = Callable[[bytes, Crop, int], Pixels]


def ours(image: bytes, crop: Crop, size: int) -> Pixels:
    """What ships: in this process decodes regions if `jpeg.DECODER` says so."""
    out = np.empty((size, size, 3), dtype=np.uint8)
    decode(image, out, lambda width, height: crop)
    return out


def without_module(image: bytes, crop: Crop, size: int) -> Pixels:
    """What ships, where the C module was not built."""
    used, jpeg.DECODER = jpeg.DECODER, "whole"
    try:
        return ours(image, crop, size)
    finally:
        jpeg.DECODER = used


def shown(pixels: Pixels, crop: Crop, size: int) -> Pixels:
    """Cut, resize and flip a whole picture as plainly as OpenCV can."""
    part = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    resized = cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
    return resized[:, ::-1] if crop.flip else resized


def whole_fast(image: bytes, crop: Crop, size: int) -> Pixels:
    """simplejpeg with its fast, inexact DCT and chroma, and no filter against aliasing."""
    pixels = simplejpeg.decode_jpeg(image, fastdct=True, fastupsample=True, strict=True)
    return shown(pixels, crop, size)


def opencv(image: bytes, crop: Crop, size: int) -> Pixels:
    """OpenCV alone; not strict."""
    pixels = cv2.imdecode(np.frombuffer(image, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    return shown(pixels, crop, size)


def pillow(image: bytes, crop: Crop, size: int) -> Pixels:
    """What torchvision's RandomResizedCrop does to a PIL image."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    with Image.open(io.BytesIO(image)) as opened:
        part = opened.convert("RGB").crop(box)
    resized = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
    return resized[:, ::-1] if crop.flip else resized


def nvimgcodec() -> Decoder:
    """NVIDIA's region decoder on the CPU; it shows damaged images without an error."""
    from nvidia import nvimgcodec as nv

    decoder = nv.Decoder(
        backends=[nv.Backend(nv.CPU_ONLY)], device_id=-99999, max_num_cpu_threads=1
    )

    def region(image: bytes, crop: Crop, size: int) -> Pixels:
        box = nv.Region(crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
        stream = nv.CodeStream(image).get_sub_code_stream(region=box)
        pixels = np.asarray(decoder.decode(stream).cpu())
        return shown(pixels, Crop(0, 0, crop.width, crop.height, crop.flip), size)

    return region


def decoders() -> dict[str, Decoder]:
    """Return what is compared, by name."""
    found: dict[str, Decoder] = {
        f"ours (here: {jpeg.DECODER})": ours,
        "ours without the C module": without_module,
        "simplejpeg, fast DCT and chroma, no filter": whole_fast,
        "OpenCV, no filter": opencv,
        "Pillow": pillow,
    }
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nvimgcodec"):
        found["nvimgcodec region, no filter"] = nvimgcodec()
    return found


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the CPU time of each pass."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append((time.process_time() - began) * 1000)
    return times


def pass_over(decoder: Decoder, images: list[bytes], crops: list[Crop], size: int) -> None:
    """Decode everything once."""
    for image, crop in zip(images, crops, strict=True):
        decoder(image, crop, size)


def errors(decoder: Decoder, images: list[bytes], crops: list[Crop], size: int) -> list[float]:
    """Return each image's distance to Pillow's pixels in grey levels (RMS)."""
    found = []
    for image, crop in zip(images, crops, strict=True):
        difference = decoder(image, crop, size).astype(float) - pillow(image, crop, size)
        found.append(math.sqrt((difference**2).mean()))
    return found


def crop_of(index: int) -> Crop:
    """Return the same crop for the same image, in every run."""
    key = hash_key("bench_decode", index)
    return random_crop(WIDTH, HEIGHT, scale=(0.08, 1.0), ratio=(0.75, 4 / 3), flip=0.5, key=key)


def main(flags: list[str]) -> int:
    """Make photographs, decode them in turns, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    options = parser.parse_args(flags)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        images = []
        for seed in range(options.images):
            write_photograph(path, seed)
            images.append(path.read_bytes())
    crops = [crop_of(index) for index in range(options.images)]
    table = decoders()
    times = {name: [math.inf] for name in (*table, "check")}
    for _ in range(options.repeats):
        for name, decoder in table.items():
            run = functools.partial(pass_over, decoder, images, crops, options.size)
            times[name] += milliseconds(run, 1)
        times["check"] += milliseconds(lambda: [check_image(image) for image in images], 1)
    print(f"| decoder, {options.images} photographs | CPU ms an image | error: mean | worst |")
    print("|---|---:|---:|---:|")
    for name, decoder in table.items():
        off = errors(decoder, images, crops, options.size)
        spent = min(times[name]) / options.images
        print(f"| {name} | {spent:.3f} | {sum(off) / len(off):.2f} | {max(off):.2f} |")
    print(
        f"| check of the whole image, no pixels | {min(times['check']) / options.images:.3f} | | |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
