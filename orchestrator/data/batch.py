"""What one worker's forward and backward pass works on, as it leaves the loader."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class MicroBatch:
    """One worker's samples of one forward and backward pass, on the host."""

    micro: int
    pixels: torch.Tensor
    """uint8, shape (n, S, S, 3)."""
    positions: list[int]
    """Stream positions of the samples, length n."""
    labels: list[int]
    ids: list[str]
    bad: list[dict[str, str]]
    """Images at this place that could not be decoded: id, uri, reason."""
    bad_position: int
    """The micro-batch's first position, by which bad images are dated."""
