"""Driver side: how large a model is and what its optimizer keeps, found out without its memory."""

import copy
import dataclasses
from collections import defaultdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import _configure_optimizers
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from orchestrator.config import ModelConfig, UserError
from orchestrator.train import model
from orchestrator.train.strategies.memory import ModelSize

# What a parameter of this many elements is cut into for a trial of an optimizer, and its rate.
_TRIAL_SHAPES = ((2, 3), (4,))
_TRIAL_RATE = 0.1


class Unmeasured(Exception):
    """Why the model's size is not known before it is built on a worker."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's size, and what ZeRO makes of the model."""

    size: ModelSize
    hindrance: str = ""
    """Why ZeRO would not train it as DDP does, or empty."""
    doubt: str = ""
    """Why its optimizer is not known, or empty."""


class _Run:
    """Stands for the trainer, which `configure_optimizers` may ask how long the run is.

    Its numbers are those of no run: what is built of them is as large with any.
    """

    estimated_stepping_batches = num_training_batches = 1000
    max_epochs, max_steps = 10, -1
    global_step = current_epoch = global_rank = local_rank = 0
    accumulate_grad_batches = world_size = num_nodes = num_devices = 1
    is_global_zero = True


def measure(config: ModelConfig, *, num_classes: int) -> Measured:
    """Build the module without allocating it (PyTorch's meta device) and count.

    Raises:
        UserError: the class or its arguments are wrong.
        Unmeasured: it cannot be built so, as where its constructor reads a tensor's values.
    """
    module = _build(config, num_classes)
    size = ModelSize.of(
        [(p.numel(), p.requires_grad) for p in module.parameters()],
        buffer_bytes=sum(b.numel() * b.element_size() for b in module.buffers()),
        optimizer="an assumed Adam",
    )
    measured = Measured(size, _passed_over(module, config.class_path))
    try:
        optimizers, schedules = _configured(module)
        first = optimizers[0]
    except Exception as error:  # the user's method
        what = f"{config.class_path}.configure_optimizers cannot be run"
        return dataclasses.replace(measured, doubt=_assumed(what, error))
    hindrance = measured.hindrance or _too_many(optimizers, schedules, config.class_path)
    return _tried(first, dataclasses.replace(measured, hindrance=hindrance), config.class_path)


def _build(config: ModelConfig, num_classes: int) -> pl.LightningModule:
    try:
        with torch.device("meta"):
            return model.build(config, num_classes=num_classes)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the user's constructor may raise anything on tensors without values
        raise Unmeasured(
            f"{config.class_path} cannot be built without memory ({type(error).__name__})"
        ) from error


def _configured(module: pl.LightningModule) -> tuple[list[Optimizer], list[Any]]:
    """Return the module's optimizers and learning-rate schedules."""
    module.trainer = _Run()  # type: ignore[assignment]
    configured: Any = module.configure_optimizers()
    optimizers, schedules, _ = _configure_optimizers(configured)
    return optimizers, schedules


def _assumed(what: str, error: Exception) -> str:
    return f"{what} beforehand ({type(error).__name__}), so that an Adam is assumed"


def _passed_over(module: pl.LightningModule, class_path: str) -> str:
    """Return what of the module DeepSpeed would leave out, with a warning at most, or nothing."""
    for hook in ("backward", "configure_gradient_clipping"):
        if is_overridden(hook, module, pl.LightningModule):
            return f"DeepSpeed does itself what {class_path}.{hook} does, and never calls that"
    return ""


def _too_many(optimizers: list[Optimizer], schedules: list[Any], class_path: str) -> str:
    for what, found in (("optimizer", optimizers), ("learning-rate schedule", schedules)):
        if len(found) > 1:
            return f"DeepSpeed trains with one {what} but {class_path} configures {len(found)}"
    return ""


def _tried(optimizer: Optimizer, measured: Measured, class_path: str) -> Measured:
    """Return what is measured with the optimizer's states, and whether ZeRO can cut them."""
    name = type(optimizer).__name__
    size = dataclasses.replace(measured.size, optimizer=name, states=_states(optimizer))
    hindrance, doubt = measured.hindrance, ""
    if isinstance(optimizer, torch.optim.Adagrad):
        # Of DeepSpeed 0.19: it makes one of the first group's options, out of a schedule's reach.
        hindrance = hindrance or f"DeepSpeed replaces {name} of {class_path} by one of its own"
    try:
        if not _is_elementwise(optimizer) and not hindrance:
            hindrance = (
                f"ZeRO lays weights end to end and cuts them anywhere, so {name} of {class_path}, "
                "whose updates look at whole tensors, would compute something else"
            )
    except Exception as error:  # as where it runs on GPUs only
        doubt = _assumed(f"{name} of {class_path} cannot be tried", error)
    return Measured(size, hindrance, doubt)


def _states(optimizer: Optimizer) -> float:
    """Return how many fp32 numbers the optimizer keeps for each weight."""
    weight = torch.zeros(_TRIAL_SHAPES[0])
    try:
        gradient, group = torch.ones_like(weight), optimizer.param_groups[0]
        state = _trial(optimizer, [weight], [gradient], group)[weight]
    except Exception:  # as where it runs on GPUs only; Adam keeps two
        return 2.0
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.ndim > 0]
    return sum(t.numel() for t in tensors) / weight.numel()


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether two small weights are updated alike apart and laid end to end, as ZeRO does.

    Not so where an update looks at a tensor's norm, rows or rank: LARS, LAMB, Adafactor, Muon.
    Parameter groups may be treated differently, so that each one's options are tried.
    """
    return all(_updates_alike(optimizer, group) for group in optimizer.param_groups)


def _updates_alike(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    # In fp64, so that a small update is not lost in its weight's rounding.
    draws = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in _TRIAL_SHAPES * 2
    ]
    weights, gradients = draws[:2], draws[2:]
    before, gradient = (torch.cat([t.flatten() for t in ts]) for ts in (weights, gradients))
    flat = before.clone()
    try:
        _trial(optimizer, [flat], [gradient], group)
        _trial(optimizer, weights, gradients, group)
    except (TypeError, ValueError):  # it wants a closure (LBFGS) or matrices (Muon)
        return False
    together, apart = flat - before, torch.cat([w.flatten() for w in weights]) - before
    return bool((together - apart).abs().max() <= 1e-3 * together.abs().max())


def _trial(
    optimizer: Optimizer,
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    group: dict[str, Any],
) -> dict[Any, Any]:
    """Take two steps with a copy of the optimizer on other weights; return its states.

    Its learning rate is one that moves them, whatever a schedule's warm-up begins with.
    """
    trial = copy.copy(optimizer)
    # Without `step`: a scheduler puts one there that is bound to the optimizer copied from.
    trial.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    trial.state = defaultdict(dict)
    parameters = [w.requires_grad_() for w in weights]
    options = {k: v for k, v in group.items() if k != "params"}
    if "lr" in options:
        options["lr"] = _TRIAL_RATE
    trial.param_groups = [{**options, "params": parameters}]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    for _ in range(2):
        trial.step()
    return trial.state
