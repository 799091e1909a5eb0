"""Worker side: the Lightning callback that counts, commits and reports."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray.train
import torch
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.utilities.types import STEP_OUTPUT

from orchestrator.config import UserError
from orchestrator.data.loader import Loader
from orchestrator.overrides import config_digest
from orchestrator.progress import Progress
from orchestrator.run import append_event
from orchestrator.train import checkpoint, state
from orchestrator.train.journal import Consumed, Metrics, Quarantine, RunFacts, upload_logs
from orchestrator.train.pace import Pace, Schedule
from orchestrator.train.place import Place
from orchestrator.train.strategy import sync_buffers
from orchestrator.train.tally import Tally, TooManyBadImages

_LOG_EVERY_STEPS = 5
_POST_EVERY_S = 0.5
# A chunk of some MB takes a fraction of a second; one that takes this long is named.
_SLOW_READ_S = 10.0


class Recorder(pl.Callback):
    """Counts steps by what the loader delivered, commits checkpoints, reports to Ray and the board.

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
        self._facts = facts
        self._config = facts.config
        self._loader = loader
        self._validation = validation
        self._resumed = resumed
        manifest = resumed[0] if resumed else None
        self.step = manifest.step if manifest else 0
        totals = manifest.stats if manifest else {}
        self._pace = Pace(lambda: loader.waited_s, totals, step=self.step)
        self._schedule = Schedule(self._config.train.checkpoint.every_seconds, step=self.step)
        self._place = Place(loader.batching, facts.samples_per_epoch)
        self._tally = Tally(max_bad_fraction=self._config.data.max_bad_fraction)
        self._posted = 0.0
        self._readable = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state: model and optimizers exist and sit on their device by now."""
        rank = trainer.global_rank
        self._consumed = Consumed(rank, self._facts.samples_per_epoch, self._config.data.audit)
        if self._resumed is not None:
            state.restore_state(trainer, self._resumed[1])
            shutil.rmtree(self._resumed[1])
        state.set_progress(trainer, step=self.step, epoch=self._epoch)
        if rank == 0:
            self._metrics = Metrics(self._facts.run, step=self.step)
            self._quarantine = Quarantine(self._facts.run)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks: what came before is start-up."""
        self._pace.start()
        self._schedule.restart(self.step)
        if trainer.global_rank == 0:
            append_event(self._facts.run, "training", step=self.step, workers=trainer.world_size)

    @property
    def _epoch(self) -> int:
        return self._place.epoch(self.step)

    @property
    def _position(self) -> int:
        return self._place.position(self.step)

    @property
    def steps_left_in_epoch(self) -> int:
        """Steps from the next one to the last that starts in its epoch."""
        return self._place.steps_left_in_epoch(self.step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Key the step's random numbers."""
        current = self._loader.current
        assert current is not None
        if current.batch.micro // trainer.world_size % self._loader.batching.accumulation == 0:
            state.seed_step(self._config.seed, self.step, trainer.global_rank)

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
        if current.batch.micro // trainer.world_size % accumulation != accumulation - 1:
            return
        self.step += 1
        if self.step % _LOG_EVERY_STEPS == 0 or self._place.ends_epoch(self.step):
            self._log_loss(trainer)
        self._post(trainer, "training")
        if not self._place.ends_epoch(self.step) and self._commit_due(trainer):
            self._commit(trainer, metrics={}, done="")

    def _log_loss(self, trainer: pl.Trainer) -> None:
        problem = self._tally.reduce(trainer)
        if trainer.global_rank == 0:
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            values = {"train_loss": self._tally.mean_loss or 0.0, "lr": lr}
            self._metrics.add(values, step=self.step, epoch=self._epoch, samples=self._position)
            self._say_slow_reads()
        if problem is not None:
            self._note_bad(self._gather(trainer, self._consumed.bad))
            raise TooManyBadImages(problem)

    def _say_slow_reads(self) -> None:
        slow = self._loader.costs.take_slow(_SLOW_READ_S)
        if slow is not None:
            append_event(self._facts.run, "slow_read", uri=slow.uri, seconds=round(slow.seconds, 1))

    def _gather(self, trainer: pl.Trainer, mine: Any) -> list[Any]:
        gathered: list[Any] = [mine]
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, mine)
        return gathered

    @property
    def _reading(self) -> dict[str, float]:
        before = self._resumed[0].stats if self._resumed else {}
        now = dataclasses.asdict(self._loader.costs)
        return {name: before.get(name, 0) + value for name, value in now.items()}

    def _note_bad(self, gathered: list[list[dict[str, Any]]]) -> None:
        if ray.train.get_context().get_world_rank() == 0:
            for row in self._quarantine.add([row for bad in gathered for row in bad]):
                append_event(self._facts.run, "quarantined", **row)

    def _commit_due(self, trainer: pl.Trainer) -> bool:
        """Return the same answer on every worker: rank 0's clock decides, at agreed steps."""
        every_steps = self._config.train.checkpoint.every_steps
        if every_steps and self.step % every_steps == 0:
            return True
        return self._schedule.due(self.step, trainer.strategy.broadcast)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the model that will be saved."""
        sync_buffers(pl_module)
        self._pace.stop()
        self._post(trainer, "validating", now=True)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Note validation images that could not be decoded."""
        assert self._validation is not None
        assert self._validation.current is not None
        bad = self._validation.current.batch.bad
        self._consumed.bad += [{**entry, "epoch": self._epoch} for entry in bad]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clocks: validation is no training time.

        Raises:
            UserError: early stopping watches a metric that was not logged.
        """
        stopping = self._config.train.early_stopping
        if stopping is not None and stopping.monitor not in trainer.callback_metrics:
            logged = ", ".join(trainer.callback_metrics) or "nothing"
            raise UserError(
                f"train.early_stopping.monitor={stopping.monitor!r} was not logged by the module's "
                f"validation_step, which logged {logged}; name a logged metric."
            )
        self._pace.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Commit with the validation's metrics, and report them."""
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name != "train_loss"
        }
        done = self._done(trainer)
        self._commit(trainer, metrics=metrics, done=done)
        at = {"epoch": self._epoch, "step": self.step, "samples_seen": self._position}
        ray.train.report({**metrics, **at, "done": done})
        if trainer.global_rank == 0:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self._facts.board.say.remote(f"epoch {self._epoch}: {shown}")

    def _done(self, trainer: pl.Trainer) -> str:
        stopper = trainer.early_stopping_callback
        reason = stopper.stopping_reason if stopper else EarlyStoppingReason.NOT_STOPPED
        if reason is EarlyStoppingReason.NON_FINITE_METRIC:
            return "diverged"
        if reason is not EarlyStoppingReason.NOT_STOPPED or trainer.should_stop:
            return "converged"
        return "max_epochs" if self.step >= self._loader.batching.num_steps else ""

    def _commit(self, trainer: pl.Trainer, *, metrics: dict[str, float], done: str) -> None:
        self._pace.stop()
        self._post(trainer, "saving", now=True)
        run, uri = self._facts.run, checkpoint.checkpoint_uri(self._facts.run, self.step)
        self._consumed.write(run, step=self.step)
        with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
            state.save_state(trainer, Path(folder))
            if not self._readable:
                state.check_readable(Path(folder))
                self._readable = True
            mine = checkpoint.store_files(Path(folder), uri), self._consumed.bad
        gathered = self._gather(trainer, mine)
        self._consumed.bad = []
        if trainer.global_rank == 0:
            self._commit_rank_0(trainer, gathered, metrics, done)
        trainer.strategy.barrier("committed")
        self._schedule.restart(self.step)
        self._pace.start()

    def _commit_rank_0(
        self, trainer: pl.Trainer, gathered: list[Any], metrics: dict[str, float], done: str
    ) -> None:
        facts = self._facts
        at = {"step": self.step, "epoch": self._epoch, "samples": self._position}
        self._note_bad([bad for _, bad in gathered])
        self._metrics.add(metrics, **at)
        self._metrics.write()
        manifest = checkpoint.Manifest(
            step=self.step,
            position=self._position,
            epoch=self._epoch,
            metrics=metrics,
            done=done,
            world_size=trainer.world_size,
            strategy=facts.strategy,
            precision=facts.precision,
            config_digest=config_digest(facts.config),
            index_digest=facts.index_digest,
            stats={**self._pace.totals, **self._reading, "bad": len(self._quarantine)},
            files=tuple(record for records, _ in gathered for record in records),
        )
        upload_logs(facts.run, trainer.logger)
        checkpoint.commit(facts.run, manifest)
        monitor, mode = checkpoint.monitored(facts.config.train.early_stopping)
        best = checkpoint.best_of(checkpoint.list_manifests(facts.run), monitor=monitor, mode=mode)
        checkpoint.prune(facts.run, keep=facts.config.train.checkpoint.keep, best=best)

    def _post(self, trainer: pl.Trainer, phase: str, *, now: bool = False) -> None:
        moment = time.perf_counter()
        if trainer.global_rank != 0 or (moment - self._posted < _POST_EVERY_S and not now):
            return
        self._posted = moment
        batching = self._loader.batching
        rate = self._pace.steps_per_s(self.step)
        progress = Progress(
            phase=phase,
            run=self._config.name,
            step=self.step,
            steps=batching.num_steps,
            epoch=self._epoch,
            epochs=self._config.train.max_epochs,
            loss=self._tally.mean_loss,
            images_per_s=rate * batching.step_samples or None,
            wait_share=self._pace.wait_share,
            eta_s=(batching.num_steps - self.step) / rate if rate else None,
        )
        self._facts.board.post.remote(progress)
