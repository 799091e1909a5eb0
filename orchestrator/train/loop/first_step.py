"""Worker side: the last phases of a start, and the event that says where its seconds went."""

from typing import Any

import pytorch_lightning as pl

from orchestrator.data.loader import Loader
from orchestrator.run import read_events
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.timing.startup import Startup
from orchestrator.train.timing.timeline import restarted_at


class FirstStep(pl.Callback):
    """Ends a start with its first optimizer step, and writes the event `startup`.

    Its `seconds` (phase -> seconds) add up to `total_s`. A start after the first (`restart`) begins
    where what ended the one before was noticed.

    Args:
        startup: the phases so far.
        recorder: counts the steps, and takes the event.
        loader: says what a step is.
    """

    def __init__(self, startup: Startup, recorder: Recorder, loader: Loader) -> None:
        self._startup = startup
        self._recorder = recorder
        self._loader = loader
        self._is_over = self._has_batch = False

    def on_train_start(self, *_: Any) -> None:
        """Lightning is set up."""
        self._startup.mark("trainer")

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the first batch."""
        if not self._has_batch:
            self._has_batch = True
            self._startup.mark("first batch")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """End the start with the first step."""
        assert self._loader.current is not None
        if self._is_over or not self._loader.current.ends_step:
            return
        self._is_over = True
        self._startup.mark("first step")
        if trainer.global_rank == 0:
            self._tell(workers=trainer.world_size)

    def _tell(self, *, workers: int) -> None:
        events = read_events(self._recorder.facts.run)
        due = restarted_at(events, saved_at=self._recorder.clocks.saved_at)
        found = self._startup if due is None else self._startup.since(due)
        self._recorder.committer.tell(
            "startup",
            total_s=found.total_s,
            seconds=found.seconds,
            restart=due is not None,
            workers=workers,
        )
