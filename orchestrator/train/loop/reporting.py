"""Worker side: what a run notes about itself -> its loggers, and Ray's metrics."""

import time
from typing import Any

import pytorch_lightning as pl

from orchestrator.data.loader import Loader
from orchestrator.overrides import flatten, to_dict
from orchestrator.run import read_events
from orchestrator.train.logs.meters import Meters
from orchestrator.train.logs.patient import Patient
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.timing.timeline import since_submission

_METER_EVERY_S = 0.5


class Reporter(pl.Callback):
    """Feeds loggers and meters with what the recorder notes.

    Lightning itself logs what the module logs; here come the values of whole steps over all
    workers. Belongs after the recorder.

    Args:
        recorder: notes the values.
        loader: knows what a step is, and this worker's waits.
        loggers: those of `train.loggers`, on rank 0.
    """

    def __init__(self, recorder: Recorder, loader: Loader, loggers: list[Patient]) -> None:
        self._recorder = recorder
        self._loader = loader
        self._patient = loggers
        self._metered = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the resolved config, and follow what the recorder notes from now on."""
        recorder, config = self._recorder, self._recorder.facts.config
        self._meters = Meters(config.name, rank=trainer.global_rank)
        if trainer.global_rank != 0:
            return
        # Without this one's, which begins to train later.
        events = since_submission(read_events(recorder.facts.run))
        self._restarts = sum(event["event"] == "training" for event in events)
        for logger in self._patient:
            logger.log_hyperparams(flatten(to_dict(config)))
        _count_steps(trainer, recorder)
        recorder.metrics.follow(lambda values, at: self._log(trainer, values, at))

    def _log(self, trainer: pl.Trainer, values: dict[str, float], at: dict[str, int]) -> None:
        rate = self._images_per_s
        step, samples = at["step"], at["samples"]
        if "train_loss" in values:
            known = {"train_loss": values["train_loss"], "learning_rate": values["lr"]}
            self._meters.set(known)
            values = {**values, "images_per_s": rate}
            for logger in trainer.loggers:
                logger.log_metrics({**values, "samples": samples}, step)
            return
        self._meters.set_metrics(values)
        if self._recorder.facts.config.train.validate.beside is not None:
            # No Lightning logs these: they come from a process of their own.
            for logger in trainer.loggers:
                logger.log_metrics({**values, "samples": samples}, step)

    @property
    def _images_per_s(self) -> float:
        rate = self._recorder.pace.steps_per_s(self._recorder.step)
        return rate * self._loader.batching.step_samples

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Set the meters, as often as progress is posted."""
        now = time.perf_counter()
        if now - self._metered >= _METER_EVERY_S:
            self._metered = now
            self._set(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set them as they are in the end."""
        self._set(trainer)

    def _set(self, trainer: pl.Trainer) -> None:
        recorder = self._recorder
        self._meters.set_wait_share(recorder.pace.wait_share)
        if trainer.global_rank != 0:
            return
        saves = recorder.committer.totals
        self._meters.set(
            {
                "step": recorder.step,
                "epoch": recorder.epoch,
                "samples_seen": recorder.position,
                "images_per_s": self._images_per_s,
                "restarts": self._restarts,
                "bad_images": recorder.committer.num_bad,
                "checkpoint_pause_seconds": saves["save_pause_s"],
                "checkpoint_save_seconds": saves["save_s"],
                "checkpoint_failures": saves["saves_failed"],
                "checkpoint_skipped": saves["saves_skipped"],
            }
        )


def _count_steps(trainer: pl.Trainer, recorder: Recorder) -> None:
    """Let what modules log stand at the steps done: Lightning 2.6.6 says 5 at the end of step 6."""
    connector = trainer._logger_connector
    log = connector.log_metrics

    def log_at_step(metrics: Any, step: int | None = None) -> None:
        log(metrics, recorder.step if step is None and "step" not in metrics else step)

    # Replaced for this trainer, whatever loggers it has.
    connector.log_metrics = log_at_step  # type: ignore[method-assign]
