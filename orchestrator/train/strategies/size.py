"""Driver side: how large a model is and what its optimizer keeps, found out without its memory."""

import copy
import dataclasses
from collections import defaultdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import _configure_optimizers
from torch.optim import Optimizer

from orchestrator.config import ModelConfig, UserError
from orchestrator.train import model
from orchestrator.train.strategies.memory import ModelSize

# What a parameter of this many elements is cut into for a trial of an optimizer.
_TRIAL_SHAPES = ((2, 3), (4,))


class Unmeasured(Exception):
    """Why the model's size is not known before it is built on a worker."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's size, and whether ZeRO can share its optimizer."""

    size: ModelSize
    num_optimizers: int
    elementwise: bool
    """Whether a weight's update depends on that weight's own gradients and states only."""


def measure(config: ModelConfig, *, num_classes: int) -> Measured:
    """Build the module without allocating it (PyTorch's meta device) and count.

    Raises:
        UserError: the class or its arguments are wrong.
        Unmeasured: it cannot be built so, as where its constructor reads a tensor's values.
    """
    try:
        with torch.device("meta"):
            module = model.build(config, num_classes=num_classes)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the user's constructor may raise anything on tensors without values
        raise Unmeasured(
            f"{config.class_path} cannot be built without memory ({type(error).__name__})"
        ) from error
    shapes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    optimizers = _optimizers(module)
    if not optimizers:
        return Measured(ModelSize.of(shapes, buffer_bytes=buffers), 0, True)
    size = ModelSize.of(
        shapes,
        buffer_bytes=buffers,
        states=_states(optimizers[0]),
        optimizer=type(optimizers[0]).__name__,
    )
    return Measured(size, len(optimizers), _is_elementwise(optimizers[0]))


def _optimizers(module: pl.LightningModule) -> list[Optimizer]:
    """Return the module's optimizers; none where they ask for a trainer or the like."""
    try:
        configured: Any = module.configure_optimizers()
        optimizers: list[Optimizer] = _configure_optimizers(configured)[0]
    except Exception:  # the user's method; without it Adam is assumed, which keeps the most
        return []
    return optimizers


def _states(optimizer: Optimizer) -> float:
    """Return how many fp32 numbers the optimizer keeps for each weight."""
    weight = torch.zeros(_TRIAL_SHAPES[0])
    try:
        state = _trial(optimizer, [weight], [torch.ones_like(weight)])[weight]
    except Exception:  # as where it runs on GPUs only
        return 2.0
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim > 0]
    return sum(t.numel() for t in tensors) / weight.numel()


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether two small weights are updated alike apart and laid end to end, as ZeRO does.

    Not so where an update looks at a tensor's norm, rows or rank: LARS, LAMB, Adafactor, Muon.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator) for shape in _TRIAL_SHAPES * 2]
    weights, gradients = draws[:2], draws[2:]
    flat, flat_gradient = (torch.cat([t.flatten() for t in ts]) for ts in (weights, gradients))
    try:
        _trial(optimizer, [flat], [flat_gradient])
        _trial(optimizer, weights, gradients)
    except (TypeError, ValueError):  # it wants a closure (LBFGS) or matrices (Muon)
        return False
    except Exception:  # as where it runs on GPUs only: not known, so the user is believed
        return True
    return torch.allclose(flat, torch.cat([w.flatten() for w in weights]), rtol=1e-4, atol=1e-6)


def _trial(
    optimizer: Optimizer, weights: list[torch.Tensor], gradients: list[torch.Tensor]
) -> dict[Any, Any]:
    """Take two steps with a copy of the optimizer on other weights; return its states."""
    trial = copy.copy(optimizer)
    # Without `step`: a scheduler puts one there that is bound to the optimizer copied from.
    trial.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    trial.state = defaultdict(dict)
    parameters = [w.requires_grad_() for w in weights]
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    trial.param_groups = [{**options, "params": parameters}]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    for _ in range(2):
        trial.step()
    return trial.state
