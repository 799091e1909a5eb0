"""Worker side: a Lightning logger whose server may be slow or gone: training does not notice."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from pytorch_lightning.loggers import Logger

from orchestrator.train import model

# Entries that wait for a server; what comes then is counted as lost.
_MAX_WAITING = 1_000
_TELL_EVERY_S = 60.0
# How long a server may hold up the end of a run.
_CLOSE_S = 30.0


class Tell(Protocol):
    """What takes an event."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Take an event."""


class Patient(Logger):
    """Does in a thread of its own what its logger does, and outlives what that raises.

    Mixed into the logger's class by `patient`, so that a module finds the type that it looks for.
    """

    kind: str
    """Name of the logger's class."""

    def begin(self, tell: Tell) -> None:
        """Start the thread."""
        self._tell = tell
        self._lost = 0
        self._told: float | None = None
        self._work: queue.Queue[Callable[[], Any] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._follow, name=f"log-{self.kind}", daemon=True)
        self._thread.start()

    @property
    def _own(self) -> Any:
        """The logger's own methods."""
        return super()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log values of a step, soon."""
        values = dict(metrics)
        self.later(lambda: self._own.log_metrics(values, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log settings, soon."""
        self.later(lambda: self._own.log_hyperparams(*args, **kwargs))

    def save(self) -> None:
        """Write what is buffered, soon."""
        self.later(lambda: self._own.save())

    def finalize(self, status: str) -> None:
        """Close the logger, when it has done what is left; a while later without it."""
        self.later(lambda: self._own.finalize(status))
        try:
            self._work.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(timeout=_CLOSE_S)

    def later(self, do: Callable[[], Any]) -> None:
        """Do something of this logger's in its thread; at once where that is this one."""
        if threading.current_thread() is self._thread:
            do()
            return
        try:
            self._work.put_nowait(do)
        except queue.Full:
            self._fail("it does not keep up")

    def _follow(self) -> None:
        while (do := self._work.get()) is not None:
            try:
                do()
            except Exception as error:  # a server that is gone must not end training
                self._fail(model.describe(error))

    def _fail(self, error: str) -> None:
        self._lost += 1
        now = time.monotonic()
        if self._told is None or now - self._told >= _TELL_EVERY_S:
            self._told = now
            self._tell("logger_failed", logger=self.kind, error=error, lost=self._lost)


def patient(found: type[Logger], args: dict[str, Any], *, tell: Tell) -> Patient:
    """Build a logger of a class, made patient."""
    mixed = type(found.__name__, (Patient, found), {"kind": found.__name__})
    built: Patient = mixed(**args)
    built.begin(tell)
    return built
