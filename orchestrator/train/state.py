"""Worker side: what a checkpoint holds besides weights and optimizer states, and how it comes back.

Lightning's own resume restores its loops' counters of micro-batches, which mean something else at
another world size. Here every counter is derived from one integer, the step, and the trainer starts
a fresh epoch of what is left. Random numbers need no state either: they are keyed by the step.
"""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from orchestrator.config import UserError
from orchestrator.data.stream import hash_key
from orchestrator.train.strategy import WEIGHTS_FILE, ModelStrategy, read_tensors

TRAINER_FILE = "trainer.pt"


def save_state(trainer: pl.Trainer, folder: Path) -> None:
    """Write this worker's share of the training state below `folder`; all workers call it.

    Only tensors and primitives are written, so that loading never runs code.
    """
    strategy: ModelStrategy = trainer.strategy  # type: ignore[assignment]
    strategy.save_shards(folder)
    weights = strategy.weights()
    extra: dict[str, Any] = {}
    trainer.lightning_module.on_save_checkpoint(extra)
    if trainer.global_rank != 0:
        return
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    callbacks = {c.state_key: c.state_dict() for c in trainer.callbacks}  # type: ignore[attr-defined]
    state = {
        "schedulers": schedulers,
        "callbacks": {key: value for key, value in callbacks.items() if value},
        "precision": trainer.precision_plugin.state_dict(),
        "module": extra,
    }
    torch.save(weights, folder / WEIGHTS_FILE)
    torch.save(state, folder / TRAINER_FILE)


def check_readable(folder: Path) -> None:
    """Read back what this worker wrote: a checkpoint that cannot be loaded is worth nothing.

    Raises:
        UserError: the user's module or optimizer keeps something else than tensors and primitives.
    """
    for path in sorted(folder.glob("*.pt")):
        try:
            read_tensors(path)
        except pickle.UnpicklingError as error:
            what = str(error).split("Unsupported")[-1].split("was not")[0].strip()
            raise UserError(
                f"the checkpoint's {path.name} holds more than tensors and primitives ({what}), so "
                "it could not be loaded safely; convert it in the module's on_save_checkpoint or "
                "configure_optimizers."
            ) from error


def restore_state(trainer: pl.Trainer, folder: Path) -> None:
    """Read back what `save_state` wrote; all workers call it."""
    strategy: ModelStrategy = trainer.strategy  # type: ignore[assignment]
    strategy.load_shards(folder)
    state = read_tensors(folder / TRAINER_FILE)
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(saved)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in state["callbacks"]:
            saved = state["callbacks"][callback.state_key]
            # The patience may be changed on a resume; what has been waited so far stays.
            own = callback.state_dict().get("patience")
            callback.load_state_dict(saved if own is None else {**saved, "patience": own})
    trainer.precision_plugin.load_state_dict(state["precision"])
    trainer.lightning_module.on_load_checkpoint(state["module"])


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
