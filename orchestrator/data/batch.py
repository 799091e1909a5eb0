"""What one worker's forward and backward pass works on, as it leaves the loader."""

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class MicroBatch:
    """One worker's samples of one forward and backward pass, on the host."""

    micro: int
    pixels: torch.Tensor
    """uint8, shape (n, S, S, 3)."""
    positions: list[int]
    """Stream positions of the samples, length n."""
    epochs: list[int]
    """The epoch that keys each sample's augmentation, length n."""
    labels: list[Any]
    """Each an int, a list of int, or a float, as the index's `label_kind` says, or None."""
    ids: list[str]
    bad: list[dict[str, Any]]
    """Images at this place that could not be decoded: id, uri, reason, first_bytes (hex), epoch."""
