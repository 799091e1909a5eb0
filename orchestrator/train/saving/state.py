"""Worker side: what a checkpoint holds besides weights and optimizer states, and how it comes back.

Lightning's own resume restores its loops' counters of micro-batches, which mean something else at
another world size. Here every counter is derived from one integer, the step, and the trainer starts
a fresh epoch of what is left. Random numbers need no state either: they are keyed by the step.
"""

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from orchestrator.config import UserError
from orchestrator.data.stream import hash_key
from orchestrator.train.saving.snapshot import without_tensors
from orchestrator.train.strategies.strategy import ModelStrategy
from orchestrator.train.strategies.tensors import (
    EXTRA_WEIGHTS,
    OPTIMIZERS_FILE,
    TRAINER_FILE,
    WEIGHTS_FILE,
    read_tensors,
    read_weights,
    split_weights,
    write_weights,
)

State = dict[str, Any]
"""File name -> what it holds: tensors and primitives in nested dicts, lists and tuples."""


def capture_state(trainer: pl.Trainer) -> State:
    """Return this worker's share of the training state, by reference; all workers call it."""
    strategy: ModelStrategy = trainer.strategy  # type: ignore[assignment]
    shards = strategy.shards()
    # As Lightning's hooks expect it: they may put more in, or averaged weights (EMA) in its place.
    hooked: dict[str, Any] = {"state_dict": strategy.weights()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_save_checkpoint(trainer, trainer.lightning_module, hooked)
    trainer.lightning_module.on_save_checkpoint(hooked)
    if trainer.global_rank != 0:
        return shards
    weights, extra = split_weights(hooked.pop("state_dict"))
    callbacks = {c.state_key: c.state_dict() for c in trainer.callbacks}  # type: ignore[attr-defined]
    rest = {
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": {key: value for key, value in callbacks.items() if value},
        "precision": trainer.precision_plugin.state_dict(),
        "global_step": trainer.global_step,
        "module": hooked,
        EXTRA_WEIGHTS: extra,
    }
    state: State = {WEIGHTS_FILE: weights, TRAINER_FILE: rest, **shards}
    optimizers = strategy.optimizer_states()
    return state if optimizers is None else {**state, OPTIMIZERS_FILE: optimizers}


def write_state(state: State, folder: Path) -> None:
    """Write a captured (or copied) state below `folder`, a file for each entry."""
    for name, content in state.items():
        if name == WEIGHTS_FILE:
            write_weights(content, folder / name)
        else:
            torch.save(content, folder / name)


def check_readable(state: State) -> None:
    """Check that a state would load again: a checkpoint that cannot be loaded is worth nothing.

    Raises:
        UserError: the user's module or optimizer keeps something else than tensors and primitives.
    """
    for name, content in state.items():
        written = io.BytesIO()
        try:
            torch.save(without_tensors(content), written)
            written.seek(0)
            torch.load(written, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            what = str(error).split("Unsupported")[-1].split("was not")[0].strip()
            raise UserError(
                f"the checkpoint's {name} holds more than tensors and primitives ({what}), so "
                "it could not be loaded safely; convert it in the module's on_save_checkpoint or "
                "configure_optimizers."
            ) from error


def kinds_in(state: Any) -> set[type]:
    """Return the types in a state: where there is none that was not checked, it is readable.

    It takes 1 ms for 300 parameters with Adam's state, where `check_readable` takes 50.
    """
    found, left = set(), [state]
    while left:
        value = left.pop()
        found.add(type(value))
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
    return found


def restore_state(trainer: pl.Trainer, folder: Path) -> None:
    """Read back what `write_state` wrote, after `set_progress`; all workers call it."""
    strategy: ModelStrategy = trainer.strategy  # type: ignore[assignment]
    state = read_tensors(folder / TRAINER_FILE)
    hooked = {**state["module"], "state_dict": read_weights(folder)}
    trainer.lightning_module.on_load_checkpoint(hooked)
    strategy.load_shards(folder, hooked["state_dict"])
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(saved)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in state["callbacks"]:
            saved = state["callbacks"][callback.state_key]
            # The patience may be changed on a resume; what has been waited so far stays.
            own = callback.state_dict().get("patience")
            callback.load_state_dict(saved if own is None else {**saved, "patience": own})
        callback.on_load_checkpoint(trainer, trainer.lightning_module, hooked)
    trainer.precision_plugin.load_state_dict(state["precision"])
    # Where a module steps several optimizers by hand, Lightning counts each; older files lack it.
    by_hand = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    by_hand.completed = state.get("global_step", by_hand.completed)


def load_module(module: pl.LightningModule, folder: Path) -> None:
    """Give a module that is not being trained the weights of a checkpoint's files."""
    saved = read_tensors(folder / TRAINER_FILE)["module"]
    hooked = {**saved, "state_dict": read_weights(folder)}
    module.on_load_checkpoint(hooked)
    module.load_state_dict(hooked["state_dict"])


def set_progress(trainer: pl.Trainer, *, step: int, epoch: int) -> None:
    """Tell Lightning's loops that `step` optimizer steps and `epoch` epochs lie behind."""
    loop = trainer.fit_loop
    epochs: Any
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        epochs.ready = epochs.started = epochs.processed = epochs.completed = epoch
    optimizer_steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    optimizer_steps.total.ready = optimizer_steps.total.completed = step
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step
    loop.epoch_loop._batches_that_stepped = step


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key all random numbers of a step (dropout and the like) by (seed, step, rank)."""
    key = hash_key("step", seed, step, rank)
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
