"""Worker side: files of tensors and primitives; reading one never runs code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZERS_FILE = "optimizers.pt"
TRAINER_FILE = "trainer.pt"
# Of trainer.pt: what a module's state dict holds besides plain tensors (`get_extra_state`).
EXTRA_WEIGHTS = "extra_weights"

# What the safetensors format has a name for.
_STORABLE = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


def read_tensors(path: Path) -> Any:
    """Read a file of tensors and primitives; anything that would run code is refused."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(folder: Path) -> dict[str, Any]:
    """Read a model's state dict from a checkpoint's files."""
    weights: dict[str, Any] = read_tensors(folder / WEIGHTS_FILE)
    return {**weights, **read_tensors(folder / TRAINER_FILE)[EXTRA_WEIGHTS]}


def write_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write what `split_weights` calls tensors as safetensors, which other tools read too."""
    # A buffer may be laid out channels-last, which the format does not know.
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})


def split_weights(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a state dict's plain tensors, and what safetensors cannot hold."""
    plain = {name: value for name, value in state.items() if _is_storable(value)}
    return plain, {name: value for name, value in state.items() if name not in plain}


def _is_storable(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.dtype in _STORABLE
    )
