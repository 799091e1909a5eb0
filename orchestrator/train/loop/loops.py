"""Worker side: Lightning's trainer, counting in steps of the run in place of one worker's batches.

What Lightning 2.6.6 counts changes with the number of workers and starts again at a resume: its
total of steps is what is left of this epoch times the epochs, `frequency` of a schedule is in
micro-batches of this epoch. Here a step is `global_batch` samples everywhere, so that learning
rates are a function of the samples consumed.
"""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer import call
from pytorch_lightning.utilities.types import LRSchedulerConfig

from orchestrator.config import UserError
from orchestrator.data.plan import Batching
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.place import Place


class Trainer(pl.Trainer):
    """A Lightning trainer that knows how long the whole run is, however late it joined.

    Args:
        place: the run's steps.
        options: those of Lightning's trainer.
    """

    def __init__(self, place: Place, **options: Any) -> None:
        self._place = place
        super().__init__(**options)
        self.fit_loop.epoch_loop = EpochLoop(self)

    @property
    def _batching(self) -> Batching:
        return self._place.batching

    @property
    def estimated_stepping_batches(self) -> int:
        """Optimizer steps of the whole run, from its first one on."""
        return self._batching.num_steps

    @property
    def num_training_batches(self) -> int:
        """This worker's micro-batches in the first epoch; a later one may have a step less.

        Not those of the epoch in hand: a schedule made of them would change with a resume.
        """
        return self._place.steps_left_in_epoch(0) * self._batching.accumulation


class EpochLoop(_TrainingEpochLoop):
    """Updates learning rates by the run's steps and epochs, and plateaus before a commit."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.monitored: dict[str, float] = {}
        """Last value of each metric that a plateau schedule watches."""
        self._plateaus_at: dict[str, int] = {}

    def _update_learning_rates(self, interval: str, update_plateau_schedulers: bool) -> None:
        trainer = self.trainer
        count = trainer.global_step if interval == "step" else trainer.current_epoch + 1
        if update_plateau_schedulers:
            self.update_plateaus(interval, count)
        else:
            self._update(interval, count, plateaus=False)

    def update_plateaus(self, interval: str, count: int) -> None:
        """Update ReduceLROnPlateau after so many steps or epochs, unless that was done before."""
        if self._plateaus_at.get(interval) != count:
            self._plateaus_at[interval] = count
            self._update(interval, count, plateaus=True)

    def _update(self, interval: str, count: int, *, plateaus: bool) -> None:
        if not self.trainer.lightning_module.automatic_optimization:
            return
        for config in self.trainer.lr_scheduler_configs:
            due = config.interval == interval and count % config.frequency == 0
            if due and config.reduce_on_plateau == plateaus:
                self._step_schedule(config)

    def _step_schedule(self, config: LRSchedulerConfig) -> None:
        value = self._watched(config) if config.reduce_on_plateau else None
        if config.reduce_on_plateau and value is None:
            return
        self.scheduler_progress.increment_ready()
        hook, scheduler = "lr_scheduler_step", config.scheduler
        call._call_lightning_module_hook(self.trainer, hook, scheduler, value)
        self.scheduler_progress.increment_completed()

    def note(self, name: str) -> None:
        """Keep the value of a metric, if it is logged by now."""
        found = self.trainer.callback_metrics.get(name)
        if found is not None:
            self.monitored[name] = float(found)

    def _watched(self, config: LRSchedulerConfig) -> float | None:
        name = str(config.monitor)
        self.note(name)
        if name not in self.monitored and config.strict:
            logged = ", ".join(self.trainer.callback_metrics) or "nothing"
            raise UserError(
                f"configure_optimizers watches {name!r} with ReduceLROnPlateau but the module "
                f"has logged {logged} by then; log it, raise the schedule's frequency, or, where "
                "it is logged by validation_step, set train.validate.beside to null."
            )
        return self.monitored.get(name)


class Plateaus(pl.callbacks.Checkpoint):
    """Updates ReduceLROnPlateau before the recorder commits, so that no resume loses an update.

    Lightning calls callbacks of this class last, in their order: this one before the recorder.

    Args:
        recorder: knows the step, and whether a validation follows it.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the loop, which `state_dict` is not told."""
        loop = trainer.fit_loop.epoch_loop
        assert isinstance(loop, EpochLoop)
        self._loop = loop

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether they can be updated.

        Raises:
            UserError: one watches validations that other processes do, at no step known beforehand.
        """
        train = self._recorder.facts.config.train
        if train.validate.beside is None or train.early_stopping is None:
            return
        watched = train.early_stopping.monitor
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor == watched:
                raise UserError(
                    f"train.validate.beside finds {watched!r} some steps later, at other ones "
                    "each time, so that ReduceLROnPlateau in configure_optimizers cannot follow "
                    "it; set train.validate.beside to null, or use another schedule."
                )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Update those that watch steps, unless a validation comes first."""
        step = trainer.global_step
        if not self._loop._should_accumulate() and not self._recorder.timetable.is_due(step):
            self._loop.update_plateaus("step", step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update those that watch steps; after a resume in front of it, also the epoch's."""
        if self._recorder.cut_short:
            return
        self._loop.update_plateaus("step", trainer.global_step)
        recorder = self._recorder
        if recorder.owes_validation and recorder.place.ends_epoch(recorder.step):
            self._loop.update_plateaus("epoch", recorder.epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Update those that watch epochs: all metrics of the epoch are logged by now."""
        if self._loop._num_ready_batches_reached():  # else early stopping ended it
            self._loop.update_plateaus("epoch", trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run could not know before its first validation."""
        for config in self._loop.trainer.lr_scheduler_configs:
            self._loop.note(str(config.monitor))
        return dict(self._loop.monitored)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._loop.monitored |= state_dict
