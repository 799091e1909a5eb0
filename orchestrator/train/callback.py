"""Worker side: the Lightning callback that counts, commits and reports."""

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
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.types import STEP_OUTPUT

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.loader import Loader
from orchestrator.overrides import config_digest
from orchestrator.progress import Progress
from orchestrator.run import append_event
from orchestrator.train import checkpoint, state
from orchestrator.train.journal import Consumed, Metrics, Quarantine, RunFacts
from orchestrator.train.pace import Pace, Schedule
from orchestrator.train.strategy import sync_buffers

_LOG_EVERY_STEPS = 5
_POST_EVERY_S = 0.5


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
        self._loss_sum: torch.Tensor | float = 0.0
        self._loss_samples = 0
        self._mean_loss: float | None = None
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
        """The epoch of the next step's first sample."""
        return self._position // self._facts.samples_per_epoch

    @property
    def _position(self) -> int:
        batching = self._loader.batching
        return min(self.step * batching.step_samples, batching.total)

    @property
    def steps_left_in_epoch(self) -> int:
        """Steps from the next one to the last that starts in its epoch; it may end in the next."""
        end = (self._epoch + 1) * self._facts.samples_per_epoch
        return -(-end // self._loader.batching.step_samples) - self.step

    @property
    def _at_epoch_end(self) -> bool:
        first = (self.step - 1) * self._loader.batching.step_samples
        return self._position >= (first // self._facts.samples_per_epoch + 1) * (
            self._facts.samples_per_epoch
        )

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
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None and current.loss_samples:
            # Lightning hands over the loss divided by the accumulation. It stays on the device:
            # reading it here would make a GPU wait at every micro-batch.
            share = accumulation * current.loss_samples
            self._loss_sum = self._loss_sum + loss.detach().double() * share
            self._loss_samples += current.loss_samples
        if current.batch.micro // trainer.world_size % accumulation != accumulation - 1:
            return
        self.step += 1
        if self.step % _LOG_EVERY_STEPS == 0 or self._at_epoch_end:
            self._log_loss(trainer)
        self._post(trainer, "training")
        if not self._at_epoch_end and self._commit_due(trainer):
            self._commit(trainer, metrics={}, done="")

    def _log_loss(self, trainer: pl.Trainer) -> None:
        total = torch.tensor(
            [float(self._loss_sum), self._loss_samples], device=trainer.strategy.root_device
        )
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        loss = float(total[0] / total[1].clamp(min=1))
        self._loss_sum, self._loss_samples = 0.0, 0
        self._mean_loss = loss
        if trainer.global_rank == 0:
            values = {"train_loss": loss, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
            self._metrics.add(values, step=self.step, epoch=self._epoch, samples=self._position)

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
        samples = self._position
        report = {"epoch": self._epoch, "step": self.step, "samples_seen": samples, "done": done}
        ray.train.report({**metrics, **report})
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
        gathered: list[Any] = [mine]
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, mine)
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
        for row in self._quarantine.add([row for _, bad in gathered for row in bad]):
            append_event(facts.run, "quarantined", **row)
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
            stats={**self._pace.totals, "bad": len(self._quarantine)},
            files=tuple(record for records, _ in gathered for record in records),
        )
        self._upload_logs(trainer)
        checkpoint.commit(facts.run, manifest)
        monitor, mode = checkpoint.monitored(facts.config.train.early_stopping)
        best = checkpoint.best_of(checkpoint.list_manifests(facts.run), monitor=monitor, mode=mode)
        checkpoint.prune(facts.run, keep=facts.config.train.checkpoint.keep, best=best)

    def _upload_logs(self, trainer: pl.Trainer) -> None:
        """Copy TensorBoard's files to the run folder where that is no local path."""
        logger = trainer.logger
        if isinstance(logger, TensorBoardLogger) and storage.is_s3(self._facts.run):
            logger.experiment.flush()
            # Not trainer.log_dir: that is a collective, and only rank 0 is here.
            target = storage.join(self._facts.run, "tensorboard")
            checkpoint.store_files(Path(logger.log_dir), target)

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
            loss=self._mean_loss,
            images_per_s=rate * batching.step_samples or None,
            wait_share=self._pace.wait_share,
            eta_s=(batching.num_steps - self.step) / rate if rate else None,
        )
        self._facts.board.post.remote(progress)
