"""Worker side: how many samples the model was given when it ran out of memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl

from orchestrator import cluster
from orchestrator.config import UserError
from orchestrator.data.loader import Loader
from orchestrator.train.errors import OutOfMemory, is_out_of_memory
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.memory_limits import EVAL_BATCH, MICRO_BATCH


class Pushed(pl.Callback):
    """Looks at what was under way when memory ran out, and raises it as `OutOfMemory`.

    Args:
        loader: this worker's training batches.
        validation: its validation batches, if there are any.
        recorder: knows the step, and whether it saves.
    """

    def __init__(self, loader: Loader, validation: Loader | None, recorder: Recorder) -> None:
        self._loader, self._validation, self._recorder = loader, validation, recorder
        self._found: tuple[str, int] | None = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Look, before Lightning forgets whether it trained or validated."""
        self._found = self._under_way(trainer)

    def _under_way(self, trainer: pl.Trainer) -> tuple[str, int] | None:
        if self._recorder.is_saving:
            return None  # a save holds as much whatever the micro-batch
        if trainer.validating and self._validation is not None:
            return EVAL_BATCH, self._validation.batching.micro_batch
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        # Neither what is set up before the first batch nor what follows one gets smaller.
        between = self._loader.current is None or batches.processed > batches.completed
        return None if between else (MICRO_BATCH, self._loader.batching.micro_batch)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Raise what runs out of memory inside with the samples that were too many.

        Raises:
            OutOfMemory: fewer may fit.
            UserError: it was a single one.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self._found is None or not is_out_of_memory(error):
                raise
            raise self._named(*self._found, cluster.sentence(error)) from None

    def _named(self, setting: str, size: int, said: str) -> Exception:
        step = self._recorder.step + 1
        if size > 1:
            return OutOfMemory(setting, size, step, said)
        return UserError(
            f"{setting}: step {step} ran out of memory with one sample at once ({said}); take a "
            "smaller data.image_size or model, train.strategy zero2 or zero3, train.precision "
            "bf16, or workers with more memory."
        )
