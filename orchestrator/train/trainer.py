"""Worker side: the Lightning trainer of a run: strategy, precision, callbacks, loggers."""

import dataclasses
import tempfile
from typing import Any

import pytorch_lightning as pl
import ray.train.torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from ray.train.lightning import RayLightningEnvironment, prepare_trainer

from orchestrator import storage
from orchestrator.data.loader import Loader, Pass
from orchestrator.train.callback import Recorder
from orchestrator.train.job import Job
from orchestrator.train.precision import Choice, lightning_precision
from orchestrator.train.strategy import build_strategy


class Batches(pl.LightningDataModule):
    """Hands Lightning one epoch at a time: what is left of the current one."""

    def __init__(self, recorder: Recorder, loader: Loader, validation: Loader | None) -> None:
        super().__init__()
        self._recorder = recorder
        self._loader = loader
        self._validation = validation

    def train_dataloader(self) -> Pass:
        """Return the batches from the next step to the end of its epoch."""
        return self._loader.take(self._recorder.steps_left_in_epoch)

    def val_dataloader(self) -> Pass | list[Any]:
        """Return one pass over the validation split."""
        return [] if self._validation is None else self._validation.take(1)


def build_trainer(job: Job, recorder: Recorder, loader: Loader, precision: Choice) -> pl.Trainer:
    """Return the Lightning trainer of a run, prepared for Ray Train."""
    config = job.config
    callbacks: list[pl.Callback] = [recorder]
    if config.train.early_stopping is not None:
        stopping = dataclasses.asdict(config.train.early_stopping)
        # Before the recorder, so that a commit holds its count of this validation.
        # Not strict: the recorder says in one sentence that its metric was never logged.
        callbacks.insert(0, EarlyStopping(**stopping, check_on_train_epoch_end=False, strict=False))

    def loss_weight() -> float:
        assert loader.current is not None
        return loader.current.weight

    # Not "auto": a worker that reserved no GPU may still see those of its machine.
    device = ray.train.torch.get_device()
    trainer = pl.Trainer(
        accelerator=device.type,
        devices="auto",
        strategy=build_strategy(
            job.strategy, loss_weight, device, offload=config.train.offload_optimizer
        ),
        plugins=[RayLightningEnvironment()],
        precision=lightning_precision(precision.value),
        max_epochs=config.train.max_epochs,
        accumulate_grad_batches=loader.batching.accumulation,
        gradient_clip_val=config.train.gradient_clip_norm,
        callbacks=callbacks,
        logger=TensorBoardLogger(_log_folder(job.run), name="", version=""),
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    prepared: pl.Trainer = prepare_trainer(trainer)
    return prepared


def _log_folder(run: str) -> str:
    if not storage.is_remote(run):
        return storage.join(run, "tensorboard")
    return tempfile.mkdtemp(prefix="orchestrator-tensorboard-")
