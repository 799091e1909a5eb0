"""Worker side: which arithmetic a run uses, and why."""

import statistics
import time
from typing import Literal

import pytorch_lightning as pl
import torch

from orchestrator.config import Precision
from orchestrator.train.strategies.choice import Choice as Choice

LightningPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]
# bf16 has to win by more than a measurement's noise, or the exact arithmetic is kept.
_LEAST_GAIN = 1.2
_PAIRS = 3
# Samples that are tried with: the first run of a shape compiles kernels, and 64 images in 12 passes
# took 3 to 4 s of a start, 16 in 8 passes 0.6 s.
_MAX_TRIED = 16


def choose_precision(
    requested: Precision,
    module: pl.LightningModule,
    *,
    device: torch.device,
    batch: int,
    image_size: int,
) -> Choice:
    """Return 32, bf16 or 16: the requested one, or for auto what this machine gains from.

    GPUs are known; on a CPU with bf16 units (AMX) the module's own forward and backward pass is
    timed in both, because small networks get slower: a ResNet-18 at 112 pixels ran 2.4x as fast in
    bf16 on such a machine, a small one at 16 pixels 0.86x.
    """
    on_gpu = device.type == "cuda"
    if requested == "16" and not on_gpu:
        return Choice("bf16", "16 was asked for, but Lightning scales fp16 losses on GPUs only")
    if requested != "auto":
        return Choice(requested, "asked for")
    if on_gpu:
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", f"{name} computes bf16 natively")
        return Choice("16", f"{name} has no native bf16; fp16 with loss scaling")
    if not torch.cpu._is_amx_tile_supported():
        return Choice("32", "no GPU, and this CPU has no bf16 units (AMX)")
    try:
        gain = _measure_gain(module, batch=batch, image_size=image_size)
    except Exception as error:
        # Whatever the user's forward does with images of noise, it is only a question of speed.
        return Choice("32", f"forward could not be tried beforehand ({type(error).__name__})")
    said = f"forward and backward in bf16 measured {gain:.2f}x as fast as in fp32 on this CPU"
    return Choice("bf16" if gain >= _LEAST_GAIN else "32", said)


def _measure_gain(module: pl.LightningModule, *, batch: int, image_size: int) -> float:
    """Return how many times faster bf16 is: the median of paired runs, after a warm-up of each."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(min(batch, _MAX_TRIED), 3, image_size, image_size, generator=generator)
    image = image.to(memory_format=torch.channels_last)
    # In evaluation mode, so that neither running statistics nor random numbers are touched.
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        ratios = [
            _seconds(module, image, low=False) / _seconds(module, image, low=True)
            for _ in range(_PAIRS + 1)
        ]
    finally:
        module.zero_grad(set_to_none=True)
        for part, is_training in modes.items():  # a frozen backbone's is not the module's
            part.training = is_training
    return statistics.median(ratios[1:])


def _seconds(module: pl.LightningModule, image: torch.Tensor, *, low: bool) -> float:
    began = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        output = module(image)
    output.float().sum().backward()
    return time.perf_counter() - began


def lightning_precision(value: str) -> LightningPrecision:
    """Return Lightning's name of a chosen precision."""
    names: dict[str, LightningPrecision] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    return names[value]
