"""Driver side: whether a checkpoint holds the weights of the model that is built now.

Read off the first bytes of its safetensors file, and held against the module without its memory.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping

import torch
from pytorch_lightning.utilities.model_helpers import is_overridden

from orchestrator import storage
from orchestrator.config import ModelConfig
from orchestrator.train import model
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.strategies.tensors import WEIGHTS_FILE, split_weights

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a weight -> its shape."""
# Eight bytes with the length of the JSON that follows them; safetensors allows it this much.
_LENGTH, _MAX_HEADER = 8, 100_000_000
# What these do to a state dict is only known where training runs.
_HOOKS = (
    "setup", "configure_model", "configure_callbacks", "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip
_SAID = 3


def check_shapes(config: ModelConfig, run: str, last: Manifest, *, num_classes: int) -> None:
    """Hold a checkpoint's weights against the model, where both can be known beforehand.

    Raises:
        CheckpointError: they are of another model, as where its code was changed.
    """
    uri = storage.join(checkpoint.checkpoint_uri(run, last.step), WEIGHTS_FILE)
    there, here = _stored(uri), _built(config, num_classes=num_classes)
    if there is None or here is None or there == here:
        return
    said = list(_differences(there, here))
    more = f" (and {len(said) - _SAID} more)" if len(said) > _SAID else ""
    raise checkpoint.CheckpointError(
        f"{uri} is of another model than {config.class_path} builds now: "
        f"{', '.join(said[:_SAID])}{more}; take the change of its code back, or give this run "
        "another --name."
    )


def _differences(there: Shapes, here: Shapes) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            yield f"{name} is not in the model"
        elif name not in there:
            yield f"{name} is not in the checkpoint"
        elif there[name] != here[name]:
            yield f"{name} has shape {list(there[name])} there and {list(here[name])} in the model"


def _stored(uri: str) -> Shapes | None:
    """Return what a safetensors file says it holds; None where it is missing or damaged."""
    # A start finds out which checkpoint is whole, and goes on from that.
    with contextlib.suppress(storage.StorageError, ValueError, KeyError, TypeError, AttributeError):
        (length,) = storage.read_ranges(uri, [(0, _LENGTH)])
        end = _LENGTH + min(int.from_bytes(length, "little"), _MAX_HEADER)
        (header,) = storage.read_ranges(uri, [(_LENGTH, end)])
        entries = json.loads(bytes(header))
        return {n: tuple(e["shape"]) for n, e in entries.items() if n != "__metadata__"}
    return None


def _built(config: ModelConfig, *, num_classes: int) -> Shapes | None:
    """Return what the module holds; None where that is not known before it trains."""
    try:
        with torch.device("meta"):
            module = model.build(config, num_classes=num_classes)
            if not module.strict_loading or any(is_overridden(name, module) for name in _HOOKS):
                return None
            weights, _ = split_weights(module.state_dict())
            return {name: tuple(weight.shape) for name, weight in weights.items()}
    except Exception:  # the user's constructor may raise anything on tensors without values
        return None
