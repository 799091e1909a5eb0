"""Worker side: the Lightning trainer of a run: strategy, precision, callbacks, loggers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray.train
import ray.train.torch
from pytorch_lightning.loggers import TensorBoardLogger
from ray.train.lightning import RayLightningEnvironment, prepare_trainer

from orchestrator import storage
from orchestrator.data.loader import Loader, Pass
from orchestrator.run import append_event
from orchestrator.train.job import Job
from orchestrator.train.logs.loggers import build_loggers
from orchestrator.train.logs.patient import patient
from orchestrator.train.loop.beside_validator import BesideValidator
from orchestrator.train.loop.elastic_pause import PauseAtNotice
from orchestrator.train.loop.first_step import FirstStep
from orchestrator.train.loop.loops import Plateaus, Trainer
from orchestrator.train.loop.pushed import Pushed
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.loop.reporting import Reporter
from orchestrator.train.loop.standstill import Standstill
from orchestrator.train.loop.starvation import Starvation
from orchestrator.train.loop.validator import Validator
from orchestrator.train.strategies.precision import Choice, lightning_precision
from orchestrator.train.strategies.strategy import build_strategy
from orchestrator.train.validation.beside import Questions


class Batches(pl.LightningDataModule):
    """Hands Lightning one epoch at a time: what is left of the current one."""

    def __init__(self, recorder: Recorder, loader: Loader, validation: Loader | None) -> None:
        super().__init__()
        self._recorder = recorder
        self._loader = loader
        self._validation = validation

    def train_dataloader(self) -> "_Keyed":
        """Return the batches from the next step to the end of its epoch."""
        recorder = self._recorder
        return _Keyed(self._loader.take(recorder.steps_left_in_epoch), recorder.key_random_numbers)

    def val_dataloader(self) -> Pass | list[Any]:
        """Return one pass over the validation split."""
        return [] if self._validation is None else self._validation.take(1)


class _Keyed:
    """Keys random numbers before any of a module's hooks: on_after_batch_transfer may augment."""

    def __init__(self, batches: Pass, key: Callable[[], None]) -> None:
        self._batches, self._key = batches, key

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            self._key()
            yield batch


def build_trainer(
    job: Job,
    recorder: Recorder,
    loader: Loader,
    pushed: Pushed,
    precision: Choice,
    *,
    scratch: Path,
) -> pl.Trainer:
    """Return the Lightning trainer of a run, prepared for Ray Train.

    What cannot be written to the run's folder at once lies in `scratch` meanwhile.
    """
    config = job.config
    callbacks: list[pl.Callback] = [recorder.guard, pushed, Plateaus(recorder), recorder]
    # After the recorder, which counts the step that it is asked about.
    beside = job.validation
    callbacks.append(
        BesideValidator(recorder, Questions(beside)) if beside else Validator(recorder)
    )
    # The first: what the others do in a hook is no longer forward and backward.
    callbacks.insert(0, recorder.clocks)
    callbacks.append(FirstStep(job.startup, recorder, loader))
    tensorboard, *extra = _loggers(job, recorder, scratch)
    callbacks.append(Reporter(recorder, loader, extra))
    limit_s = config.train.hang_timeout_s
    callbacks.append(Standstill(job.run, job.board, limit_s, recorder, loader))
    callbacks.append(Starvation(recorder, loader, limit_s=limit_s))
    # After the recorder, which counts the step that it commits.
    callbacks.append(
        PauseAtNotice(recorder, loader, config.scaling, resize_every_s=job.resize_every_s)
    )

    def loss_weight() -> float:
        assert loader.current is not None
        return loader.current.weight

    # Not "auto": a worker that reserved no GPU may still see those of its machine.
    device = ray.train.torch.get_device()
    strategy = build_strategy(
        job.strategy, loss_weight, device, offload=config.train.offload_optimizer
    )
    strategy.timeline = recorder.clocks.timeline
    trainer = Trainer(
        recorder.place,
        accelerator=device.type,
        devices="auto",
        strategy=strategy,
        plugins=[RayLightningEnvironment()],
        precision=lightning_precision(precision.value),
        max_epochs=config.train.max_epochs,
        accumulate_grad_batches=loader.batching.accumulation,
        gradient_clip_val=config.train.gradient_clip_norm,
        callbacks=callbacks,
        logger=[tensorboard, *extra],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    prepared: pl.Trainer = prepare_trainer(trainer)
    return prepared


def _loggers(job: Job, recorder: Recorder, scratch: Path) -> list[Any]:
    """Build TensorBoard's logger, and those of `train.loggers` where something is logged: rank 0.

    A full disk or a server that is gone ends none of the steps.
    """
    remote = storage.is_remote(job.run)
    save_dir = str(scratch) if remote else storage.join(job.run, "tensorboard")
    args: dict[str, Any] = {"save_dir": save_dir, "name": "", "version": ""}
    if ray.train.get_context().get_world_rank() != 0:
        return [TensorBoardLogger(**args)]

    def tell(kind: str, /, **fields: Any) -> None:
        if hasattr(recorder, "committer"):
            recorder.committer.tell(kind, **fields)
        else:  # a logger failed before training began
            append_event(job.run, kind, **fields)

    tensorboard = patient(TensorBoardLogger, args, tell=tell)
    folder = scratch if remote else Path(storage.join(job.run, "loggers"))
    return [tensorboard, *build_loggers(job.config, job.run, folder, tell)]
