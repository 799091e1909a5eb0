"""Worker side: a wait for data that does not end is said; it ends nothing.

Storage that is away is waited for on purpose, and says so itself; a reader, or Ray Data's
coordinator, that stands still says nothing, and Ray notices neither.
"""

import threading
import time
from typing import Any

import pytorch_lightning as pl

from orchestrator.data.loader import Loader
from orchestrator.train.loop.recorder import Recorder

_LOOKS = 10


class Starvation(pl.Callback):
    """Says when this worker waits for its next batch for longer than a worker may hang.

    Args:
        recorder: knows the step, and takes the event `no_data`.
        loader: this worker's training batches.
        limit_s: how long to wait without a word, and between two.
    """

    def __init__(self, recorder: Recorder, loader: Loader, *, limit_s: float) -> None:
        self._recorder, self._loader, self._limit_s = recorder, loader, limit_s
        self._over = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to look, from a thread of its own."""
        arguments = (trainer.global_rank,)
        threading.Thread(target=self._watch, args=arguments, name="no-data", daemon=True).start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop looking."""
        self._over.set()

    def on_exception(self, *_: Any) -> None:
        """Stop looking."""
        self._over.set()

    def _watch(self, rank: int) -> None:
        said = 0.0
        while not self._over.wait(self._limit_s / _LOOKS):
            since, now = self._loader.waiting_since, time.monotonic()
            if since is not None and now - max(since, said) > self._limit_s:
                said = now
                self._say(rank, now - since)

    def _say(self, rank: int, waited_s: float) -> None:
        recorder, step = self._recorder, self._recorder.step + 1
        recorder.committer.tell("no_data", rank=rank, step=step, waited_s=round(waited_s, 1))
        recorder.facts.board.say.remote(
            f"worker {rank} has waited {waited_s:.0f} s for the data of step {step}: storage is "
            "away, or a reader or Ray Data's coordinator stands still; see the nodes, or end the "
            "run and submit the same command again"
        )
