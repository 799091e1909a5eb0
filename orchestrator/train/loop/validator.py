"""Worker side: validation between steps: when it is due, what it says, what is then committed."""

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import ray.train

from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.validation.stopping import (
    check_monitor,
    lightning_key,
    standing_of_lightning,
)

# Mean over the last micro-batch only; metrics.parquet has it over all samples of some steps.
_TRAIN_LOSS = "train_loss"


class Judge(pl.callbacks.Checkpoint):
    """What validation between steps and beside them have in common: early stopping and the end.

    Args:
        recorder: counts and commits; Lightning calls it before this one, and others before both.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._rule = recorder.facts.config.train.early_stopping

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learn which worker this is."""
        self._is_first = trainer.global_rank == 0

    @property
    def state_key(self) -> str:
        """The key of Lightning's EarlyStopping, which this takes the place of."""
        return type(self).__qualname__ if self._rule is None else lightning_key(self._rule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an older checkpoint holds; newer ones keep it in their manifest."""
        if self._recorder.standing.validations == 0:
            self._recorder.standing = standing_of_lightning(state_dict)

    def logged(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return rank 0's logged metrics: workers may have logged values of their own shares."""
        mine = {name: float(value) for name, value in trainer.callback_metrics.items()}
        agreed: dict[str, float] = trainer.strategy.broadcast(mine)
        watched = self._rule.monitor if self._rule else ""
        return {n: v for n, v in agreed.items() if n != _TRAIN_LOSS or n == watched}

    def judge(self, trainer: pl.Trainer, step: int, metrics: Mapping[str, float]) -> None:
        """Hold a validation of `step` against early stopping; all workers have the same metrics.

        Raises:
            UserError: the metric that early stopping watches is not among them.
        """
        if self._rule is None:
            return
        if self._rule.monitor not in metrics:
            self._keep(trainer, metrics if step == self._recorder.step else {})
        check_monitor(self._rule, metrics)
        recorder, before = self._recorder, self._recorder.standing
        after = before.judge(self._rule, step=step, value=metrics[self._rule.monitor])
        recorder.standing = after
        if after.done:
            trainer.should_stop = True
        if after.done and not before.done:
            self.say(f"{after.done}: {after.reason}")
            said = {"done": after.done, "reason": after.reason, "best_step": after.best_step}
            self.tell("stopping", step=step, at_step=recorder.step, **said)

    def _keep(self, trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        """Commit the steps so far: a start with another monitor validates here again."""
        recorder, done = self._recorder, self.done(trainer)
        if recorder.owes_validation or self.is_saved():
            return
        recorder.commit(trainer, metrics=dict(metrics) if done else {}, done=done, must=True)
        recorder.committer.finish()

    def done(self, trainer: pl.Trainer) -> str:
        """Return why the run ends after this step, or an empty string."""
        if self._recorder.standing.done:
            return self._recorder.standing.done
        if trainer.should_stop:
            return "converged"
        is_over = self._recorder.step >= self._recorder.place.batching.num_steps
        return "max_epochs" if is_over else ""

    def is_saved(self) -> bool:
        """Wait for the save under way; return whether it was of this step. All workers call it.

        Saving it once more would write over files that its manifest vouches for.
        """
        return self._recorder.committer.finish() == self._recorder.step

    @property
    def is_due(self) -> bool:
        """Whether a step has just ended that a validation follows."""
        recorder = self._recorder
        return recorder.has_stepped and recorder.timetable.is_due(recorder.step)

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step ended its epoch."""
        return self._recorder.place.ends_epoch(self._recorder.step)

    def say(self, line: str) -> None:
        """Show a line once; all workers call it."""
        if self._is_first:
            self._recorder.facts.board.say.remote(line)

    def tell(self, kind: str, **fields: Any) -> None:
        """Add an event once; all workers call it."""
        if self._is_first:
            self._recorder.committer.tell(kind, **fields)

    def report(self, metrics: Mapping[str, float], *, step: int, done: str) -> None:
        """Report a validation of `step` to whoever started the run; all workers call it."""
        place, position = self._recorder.timetable.place, self._recorder.timetable.place.position
        at = {"epoch": place.epoch(step), "step": step, "samples_seen": position(step)}
        ray.train.report({**metrics, **at, "done": done})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        epochs = position(step) / place.samples_per_epoch
        self.say(f"epoch {epochs:.4g}: {shown}")


class Validator(Judge):
    """Stops training for a validation where one is due, and commits with its metrics.

    Args:
        recorder: counts and commits.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self._validated = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for a validation that the checkpoint was saved in front of.

        Those that another config still waited for, beside training, are dropped.
        """
        if self._recorder.pending:
            self.tell("validations_dropped", steps=list(self._recorder.pending))
            self._recorder.pending = ()
        if not self._recorder.owes_validation:
            return
        # Lightning returns at once where there is nothing to validate, or the module does not.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        if self._validated == self._recorder.step:
            self._commit(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Tell Lightning's loop, which asks next, whether to validate now.

        It validates where the number of batches is a multiple of `val_check_batch`, and with an
        infinite one after the last batch of what it takes for an epoch.
        """
        trainer.val_check_batch = 1 if self.is_due else math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge; commit at once, except where Lightning's epoch ends with this step, too."""
        if self._recorder.cut_short:
            return
        self._validated = self._recorder.step
        self.judge(trainer, self._validated, self.logged(trainer))
        recorder = self._recorder
        if not (trainer.should_stop or self.ends_epoch or recorder.owes_validation):
            self._commit(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Commit with the metrics of this step's validation, and what the epoch's end logged."""
        self._commit(trainer)

    def _commit(self, trainer: pl.Trainer) -> None:
        recorder, metrics, done = self._recorder, self.logged(trainer), self.done(trainer)
        # The one that this start goes on from, or one of a step that the module ended the run at.
        if recorder.owes_validation or self.is_saved():
            recorder.complete(recorder.step, metrics, done=done)
            recorder.write_bad(trainer)
        else:
            recorder.commit(trainer, metrics=metrics, done=done, must=True)
        self.report(metrics, step=recorder.step, done=done)
