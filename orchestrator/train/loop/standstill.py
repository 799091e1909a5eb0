"""Worker side: a step that never ends: a deadlock in a module, or a collective that one skipped.

Ray notices a process that does not answer; this is for workers that answer and get nowhere. A step
is judged only while all workers are inside of one: waiting for data, a save or a validation of any
of them is no standstill, however long it takes.
"""

import logging
import sys
import threading
import time
import traceback
from typing import Any

import pytorch_lightning as pl
import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.context import get_train_context

from orchestrator import storage
from orchestrator.data.loader import Loader
from orchestrator.storage import StorageError
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.recovery.failures import StandstillError, mark_step

# A step may take this many times as long as the longest before it, and the first one, which may
# compile, this many times the limit.
_PATIENCE = 10
_LOOKS = 10
_ASK_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class Standstill(pl.Callback):
    """Ends a start whose workers are all inside a step for too long; they leave their stacks.

    Args:
        run: URI of the run's folder.
        board: handle of the progress board actor.
        limit_s: how long a step may take where the longest one took less than a tenth of that.
        recorder: counts the steps, and knows whether it saves.
        loader: this worker's training batches: some are awaited at a step's end, see ceiling.py.
    """

    def __init__(
        self, run: str, board: Any, limit_s: float, recorder: Recorder, loader: Loader
    ) -> None:
        self._folder = storage.join(run, "stacks")
        self._board, self._limit_s = board, limit_s
        self._recorder, self._loader = recorder, loader
        self._since: float | None = None
        self._waited_s = 0.0
        self._longest_s = limit_s
        self._num_ended = 0
        self._over = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to look, from a thread of its own."""
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._training = threading.get_ident()
        # Taken here: the context belongs to this thread.
        self._failed = get_train_context().execution_context.training_thread_runner
        threading.Thread(target=self._watch, name="standstill", daemon=True).start()

    def on_train_batch_start(self, *_: Any) -> None:
        """Note that a micro-batch is under way."""
        self._waited_s = self._waited()
        self._since = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note that it has ended."""
        assert self._since is not None
        took_s = time.monotonic() - self._since - (self._waited() - self._waited_s)
        self._longest_s = max(took_s, self._longest_s if self._num_ended else 0.0)
        self._num_ended += 1
        self._since = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop looking."""
        self._over.set()

    def on_exception(self, *_: Any) -> None:
        """Stop looking."""
        self._over.set()

    def _waited(self) -> float:
        """Return the seconds that this start has waited for data and for saves."""
        return self._loader.waited_s + self._recorder.committer.totals["save_pause_s"]

    def _watch(self) -> None:
        waited_until = 0.0
        while not self._over.wait(self._limit_s / _LOOKS):
            since = self._since
            if self._loader.waiting_since is not None or self._recorder.is_saving:
                waited_until = time.monotonic()
            limit_s = max(self._limit_s, _PATIENCE * self._longest_s)
            stuck_s = 0.0 if since is None else time.monotonic() - max(since, waited_until)
            if stuck_s > limit_s:
                # First, since the one that finds all stuck ends the others.
                stack = self._stack()
                self._write_down(stack)
                if self._all_are_stuck():
                    self._raise(stuck_s, stack)
                    return

    def _all_are_stuck(self) -> bool:
        try:
            fresh_s = 3 * self._limit_s / _LOOKS
            asked = self._board.stuck.remote(self._rank, fresh_s)
            return bool(ray.get(asked, timeout=_ASK_TIMEOUT_S) == self._world_size)
        except RayError:  # nobody to ask: better to hang than to end what may be well
            return False

    def _write_down(self, stack: str) -> None:
        place = storage.join(self._folder, f"rank-{self._rank:05d}.txt")
        try:
            storage.write_atomic(place, stack.encode())
        except StorageError as error:  # the error's own trace has this worker's stack
            _log.warning("cannot write %s: %s", place, error)

    def _raise(self, stuck_s: float, stack: str) -> None:
        step = self._recorder.step
        error = StandstillError(
            f"all workers have been inside step {step + 1} for {stuck_s:.0f} s (their stacks: "
            f"{self._folder})"
        )
        mark_step(error, step)
        self._failed.get_exception_queue().put(UserExceptionWithTraceback(error, stack))

    def _stack(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sorted(sys._current_frames().items(), key=lambda f: f[0] != self._training)
        return "\n".join(
            f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in frames
        )
