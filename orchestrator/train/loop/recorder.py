"""Worker side: the Lightning callback that counts, commits and reports."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT

from orchestrator.data.loader import Loader
from orchestrator.overrides import config_digest, identity
from orchestrator.run import append_event
from orchestrator.train.loop.guard import Guard
from orchestrator.train.loop.posting import Poster
from orchestrator.train.place import Place
from orchestrator.train.recovery import failures
from orchestrator.train.saving import checkpoint, lease, state
from orchestrator.train.saving.commit import Committer
from orchestrator.train.saving.journal import Consumed, Metrics, RunFacts
from orchestrator.train.saving.saver import open_books
from orchestrator.train.strategies.strategy import sync_buffers
from orchestrator.train.tally import Tally, TooManyBadImages, gather
from orchestrator.train.timing.clocks import Clocks
from orchestrator.train.timing.pace import Pace, Schedule
from orchestrator.train.validation.stopping import Standing, standing_of
from orchestrator.train.validation.timetable import Timetable

_LOG_EVERY_STEPS = 5
# A chunk of some MB takes a fraction of a second; one that takes this long is named.
_SLOW_READ_S = 10.0
# How long a save that is under way may hold up the end of a run, and that of a failing one.
_CLOSE_S, _CLOSE_FAILED_S = 600.0, 5.0

# Of a manifest's stats: steps whose gradient fp16 could not hold, which changed nothing.
_SKIPPED = "skipped_steps"


class Recorder(pl.callbacks.Checkpoint):
    """Counts steps by what the loader delivered, commits checkpoints, reports to Ray and the board.

    Lightning calls callbacks of this class last: a commit holds what the others (averaged weights,
    early stopping) made of the step.

    Args:
        facts: what the run is.
        loader: this worker's training batches.
        validation: its validation batches, if there are any.
        resumed: the checkpoint this start goes on from, with its files, or None.
    """

    def __init__(
        self,
        facts: RunFacts,
        loader: Loader,
        validation: Loader | None,
        resumed: tuple[checkpoint.Manifest, Path] | None,
    ) -> None:
        self.facts = facts
        self._config = facts.config
        self._loader, self._validation, self._resumed = loader, validation, resumed
        manifest = resumed[0] if resumed else None
        self.step = manifest.step if manifest else 0
        self.is_saving = False
        """Whether a commit is under way, or was when something was raised."""
        totals = manifest.stats if manifest else {}
        self.pace = Pace(lambda: loader.waited_s, totals, step=self.step)
        self.schedule = Schedule(self._config.train.checkpoint.every_seconds, step=self.step)
        self.place = Place(loader.batching, facts.samples_per_epoch)
        train = self._config.train
        self.timetable = Timetable(self.place, train.validate.every_samples)
        record = manifest.stopping if manifest else {}
        self.standing = standing_of(record, train.early_stopping) or Standing()
        """What early stopping has seen; whoever validates brings it up to date."""
        self.pending = manifest.pending if manifest else ()
        """Steps of checkpoints whose validation beside training has no result yet."""
        self.cut_short = False
        """The validation under way is ended at a notice: what it says is of some images only."""
        self.metrics = Metrics(resumed[1] if resumed else None)
        self._tally = Tally(max_bad_fraction=self._config.data.max_bad_fraction)
        self._poster = Poster(facts, loader.batching, self.pace)
        skipped = int(totals.get(_SKIPPED, 0))
        self.guard = Guard(facts.run, loader, step=self.step, skipped=skipped)
        self.clocks = Clocks(facts.run, loader, self.pace, totals, step=self.step)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state: model and optimizers exist and sit on their device by now."""
        rank = trainer.global_rank
        self._consumed = Consumed(rank, self.facts.samples_per_epoch, self._config.data.audit)
        manifest, folder = self._resumed or (None, None)
        state.set_progress(trainer, step=self.step, epoch=self.epoch)
        if folder is not None:
            state.restore_state(trainer, folder)
        self.committer = Committer(
            self.facts.run,
            rank=rank,
            gather=lambda mine: gather(trainer, mine),
            settings=self._config.train.checkpoint,
            books=open_books(self.facts, trainer, self.metrics, folder) if rank == 0 else None,
            totals=manifest.stats if manifest else {},
            check_lease=partial(lease.check, self.facts.run, self.facts.lease),
        )
        self.clocks.tell = self.committer.tell
        if folder is not None:
            shutil.rmtree(folder)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let a save that is nearly done be done."""
        failures.mark_step(exception, self.step)
        if hasattr(self, "committer"):
            self.committer.close(_CLOSE_FAILED_S)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish what is still written: the last save is committed by now."""
        self.committer.close(_CLOSE_S)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks: what came before is start-up."""
        self.pace.start()
        self.schedule.restart(self.step)
        if trainer.global_rank == 0:
            append_event(self.facts.run, "training", step=self.step, workers=trainer.world_size)

    @property
    def epoch(self) -> int:
        """The epoch that the next step begins in."""
        return self.place.epoch(self.step)

    @property
    def position(self) -> int:
        """Samples of the stream that the steps so far consumed."""
        return self.place.position(self.step)

    @property
    def has_stepped(self) -> bool:
        """Whether the last micro-batch ended a step."""
        return self._loader.current is not None and self._loader.current.ends_step

    @property
    def owes_validation(self) -> bool:
        """Whether this start goes on from a checkpoint that was saved in front of a validation."""
        manifest = self._resumed[0] if self._resumed else None
        return (
            manifest is not None
            and manifest.step == self.step
            and self.timetable.is_due(self.step)
            and not manifest.metrics
        )

    @property
    def steps_left_in_epoch(self) -> int:
        """Steps from the next one to the last that starts in its epoch."""
        return self.place.steps_left_in_epoch(self.step)

    def key_random_numbers(self) -> None:
        """Key the step's random numbers, as its first micro-batch is handed out."""
        current = self._loader.current
        assert current is not None
        if current.starts_step:
            state.seed_step(self._config.seed, self.step, self._consumed.rank)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the micro-batch; at a step's end log, post and commit where due."""
        current = self._loader.current
        assert current is not None
        accumulation = self._loader.batching.accumulation
        self._consumed.add(current.batch, step=self.step + 1)
        self._tally.add_images(current.batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None and current.loss_samples:
            self._tally.add_loss(loss, current.loss_samples, accumulation=accumulation)
        if not current.ends_step:
            return
        self.step += 1
        if self.step % _LOG_EVERY_STEPS == 0 or self.place.ends_epoch(self.step):
            self._log_loss(trainer)
        self._post(trainer, "training")
        # A checkpoint in front of a validation would make a resume validate once more.
        if not self.timetable.is_due(self.step) and self._commit_due(trainer):
            self.commit(trainer, metrics={}, done="", must=False)

    def _log_loss(self, trainer: pl.Trainer) -> None:
        problem = self._tally.reduce(trainer)
        if trainer.global_rank == 0:
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            values = {"train_loss": self._tally.mean_loss or 0.0, "lr": lr}
            self.metrics.add(values, step=self.step, epoch=self.epoch, samples=self.position)
            self._say_slow_reads()
        if problem is not None:
            self.write_bad(trainer)
            raise TooManyBadImages(problem)

    def _say_slow_reads(self) -> None:
        slow = self._loader.costs.take_slow(_SLOW_READ_S)
        if slow is not None:
            self.committer.tell("slow_read", uri=slow.uri, seconds=round(slow.seconds, 1))

    def _commit_due(self, trainer: pl.Trainer) -> bool:
        """Return the same answer on every worker: rank 0's clock decides, at agreed steps."""
        every_steps = self._config.train.checkpoint.every_steps
        if every_steps and self.step % every_steps == 0:
            return True
        return self.schedule.due(self.step, trainer.strategy.broadcast)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the model that will be saved."""
        sync_buffers(pl_module)
        self.pace.stop("validation")
        self._post(trainer, "validating", now=True)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Note validation images that could not be decoded."""
        assert self._validation is not None
        assert self._validation.current is not None
        bad = self._validation.current.batch.bad
        self._consumed.bad += [{**entry, "epoch": self.epoch} for entry in bad]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clocks: validation is no training time."""
        self.pace.start()

    def commit(
        self, trainer: pl.Trainer, *, metrics: dict[str, float], done: str, must: bool
    ) -> None:
        """Begin a checkpoint of this moment; all workers call it. See `Committer.save`."""
        self.guard.look(trainer)
        self.is_saving = True
        self.pace.stop("checkpoint")
        self._post(trainer, "saving", now=True)
        at = {"step": self.step, "epoch": self.epoch, "samples": self.position}
        self.metrics.add(metrics, **at)
        self.committer.save(
            self._point(trainer, metrics, done),
            capture=lambda: state.capture_state(trainer),
            consumed=self._consumed,
            must=must,
            last=bool(done),
        )
        self.schedule.restart(self.step)
        self.pace.start()
        self.is_saving = False

    def complete(
        self, step: int, metrics: dict[str, float], *, done: str = "", **more: Any
    ) -> None:
        """Give a committed checkpoint what is known by now; all workers call it."""
        epoch, position = self.place.epoch(step), self.place.position(step)
        self.metrics.add(metrics, step=step, epoch=epoch, samples=position)
        changes: dict[str, Any] = {"metrics": metrics} if metrics else {}
        changes |= {"done": done} if done else {}
        record = self.standing.record(self._config.train.early_stopping)
        self.committer.amend(step, **changes, **more, stopping=record)

    def add_bad(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note bad images that another process found, once."""
        if self._consumed.rank == 0:
            self._consumed.bad += rows

    def write_bad(self, trainer: pl.Trainer) -> None:
        """Quarantine the bad images of all workers now, where no commit follows that would."""
        rows = [row for bad in gather(trainer, self._consumed.bad) for row in bad]
        if rows and trainer.global_rank == 0:
            self.committer.quarantine(rows)

    def _point(
        self, trainer: pl.Trainer, metrics: dict[str, float], done: str
    ) -> checkpoint.Manifest:
        facts = self.facts
        return checkpoint.Manifest(
            step=self.step,
            position=self.position,
            epoch=self.epoch,
            metrics=metrics,
            done=done,
            world_size=trainer.world_size,
            strategy=facts.strategy,
            precision=facts.precision,
            config_digest=config_digest(facts.config),
            index_digest=facts.index_digest,
            stats={**self.clocks.totals(trainer), _SKIPPED: self.guard.skips.total},
            files=(),
            stopping=self.standing.record(facts.config.train.early_stopping),
            pending=self.pending,
            settings=identity(facts.config),
        )

    def _post(self, trainer: pl.Trainer, phase: str, *, now: bool = False) -> None:
        if trainer.global_rank == 0:
            loss = self._tally.mean_loss
            self._poster.post(phase, step=self.step, epoch=self.epoch, loss=loss, now=now)
