"""Worker side: validation beside training: commits what is to be validated, hears the verdicts.

Worker 0 asks the process that validates, once a checkpoint is committed, and tells the others what
it answered some twice a second, at a step that all know. Verdicts are taken in the order of their
steps. At most two validations are under way; one that falls due meanwhile is skipped, since waiting
would hold up the steps, and a longer queue would let verdicts come ever later.
"""

from typing import Any, cast

import pytorch_lightning as pl

from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.loop.validator import Judge
from orchestrator.train.recovery.notice import Looks
from orchestrator.train.validation.beside import MAX_UNDER_WAY, Outcome, Questions


class BesideValidator(Judge):
    """Has checkpoints validated elsewhere while training goes on.

    Args:
        recorder: counts and commits.
        questions: to the process that validates; only worker 0 asks any.
    """

    def __init__(self, recorder: Recorder, questions: Questions) -> None:
        super().__init__(recorder)
        self._questions = questions
        self._unasked: list[int] = []
        self._pids: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask again for what was out when the checkpoint was saved that this start goes on from."""
        recorder = self._recorder
        self._looks: Any = Looks(step=recorder.step)
        if recorder.owes_validation and recorder.step not in recorder.pending:
            recorder.pending = (*recorder.pending, recorder.step)
        for step in recorder.pending if self._is_first else ():
            self._questions.ask(step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """At a step's end hear verdicts, commit what is due, ask for what is committed."""
        recorder = self._recorder
        if not recorder.has_stepped:
            return
        self._hear(trainer)
        if self.is_due and not (trainer.should_stop or self.ends_epoch):
            self._commit(trainer, done="")
        self._ask()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Commit; what is still out at the run's end the driver waits for."""
        recorder, done = self._recorder, self.done(trainer)
        if not self.is_saved():
            self._commit(trainer, done=done)
        else:
            # A verdict has just stopped the run, after a commit that was due by time or steps.
            recorder.pending = tuple({**dict.fromkeys(recorder.pending), recorder.step: None})
            recorder.complete(recorder.step, {}, done=done, pending=recorder.pending)
            recorder.write_bad(trainer)
        self._ask()

    def _hear(self, trainer: pl.Trainer) -> None:
        step, agree = self._recorder.step, trainer.strategy.broadcast
        if not self._recorder.pending or step >= self._recorder.place.batching.num_steps:
            return
        heard = cast(tuple[Outcome, ...] | None, self._looks.hear(step, self._see, agree))
        for outcome in heard or ():
            self._take(trainer, outcome)

    def _see(self) -> Any:
        return tuple(self._questions.take()) if self._is_first else ()

    def _take(self, trainer: pl.Trainer, outcome: Outcome) -> None:
        recorder, step = self._recorder, outcome.step
        self._note_process(outcome)
        if outcome.failed:
            self._heard(step)
            self.say(f"the validation of step {step} failed: {outcome.failed}")
            self.tell("validation_failed", step=step, error=outcome.failed)
            return
        recorder.add_bad(outcome.bad)
        self.judge(trainer, step, outcome.metrics)
        self._heard(step)  # not before: what it commits where it raises still waits for the step
        # Its standing counts this verdict now, and all before it: a resume must not ask again.
        done = recorder.standing.done
        recorder.complete(step, outcome.metrics, done=done, pending=())
        self.report(outcome.metrics, step=step, done="")

    def _heard(self, step: int) -> None:
        self._recorder.pending = tuple(s for s in self._recorder.pending if s != step)

    def _note_process(self, outcome: Outcome) -> None:
        if self._pids and outcome.pid and outcome.pid not in self._pids:
            self.tell("validation_restarted", step=outcome.step)
        self._pids |= {outcome.pid} if outcome.pid else set()

    def _commit(self, trainer: pl.Trainer, *, done: str) -> None:
        recorder = self._recorder
        asks = len(recorder.pending) < MAX_UNDER_WAY or bool(done)
        if asks:
            recorder.pending = (*recorder.pending, recorder.step)
            self._unasked.append(recorder.step)
        else:
            self.tell("validation_skipped", step=recorder.step, waiting=list(recorder.pending))
        recorder.commit(trainer, metrics={}, done=done, must=asks)

    def _ask(self) -> None:
        committed = self._recorder.committer.committed
        while self._is_first and self._unasked and self._unasked[0] <= committed:
            self._questions.ask(self._unasked.pop(0))
