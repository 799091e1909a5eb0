"""Worker side: a micro-batch of uint8 pixels -> what the user's module gets, on its device."""

from typing import Any

import torch

from orchestrator.config import DataConfig
from orchestrator.data.batch import MicroBatch


class ToDevice:
    """Move uint8 pixels to the training device and normalise them there."""

    def __init__(self, device: torch.device, data: DataConfig) -> None:
        self._device = device
        self._mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1) * 255
        self._scale = 1 / (torch.tensor(data.std, device=device).view(1, 3, 1, 1) * 255)
        self._copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: MicroBatch) -> dict[str, Any]:
        """Return {"image": float32 (n, 3, S, S) channels-last, "label": int64 (n,), "id": ...}."""
        pixels, labels = batch.pixels, torch.tensor(batch.labels, dtype=torch.int64)
        if self._copies is not None:
            pixels, labels = self._to_cuda(pixels), self._to_cuda(labels)
        image = pixels.permute(0, 3, 1, 2).to(torch.float32)
        return {
            "image": image.sub_(self._mean).mul_(self._scale),
            "label": labels,
            "id": batch.ids,
        }

    def _to_cuda(self, tensor: torch.Tensor) -> torch.Tensor:
        # Pinned memory makes the copy asynchronous; the side stream overlaps it with the
        # step before, and record_stream keeps the memory until that copy has been used.
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            copy = tensor.pin_memory().to(self._device, non_blocking=True)
        compute.wait_stream(self._copies)
        copy.record_stream(compute)
        return copy
