"""Worker side: a Lightning logger whose server may be slow or gone: training does not notice."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from pytorch_lightning.loggers import Logger
from pytorch_lightning.loggers.logger import DummyLogger

from orchestrator.train import model

# Entries that wait for a server; what comes then is counted as lost.
_MAX_WAITING = 1_000
_TELL_EVERY_S = 60.0
# How long a server may hold up the beginning of training, once.
_READY_S = 10.0
# How long it may hold up the end of a run, and that of a failing one.
_CLOSE_S, _CLOSE_FAILED_S = 30.0, 5.0


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
    has_experiment: bool
    """Whether that class has an `experiment`."""
    _thread: threading.Thread | None = None

    def begin(self, tell: Tell) -> None:
        """Start the thread."""
        self._tell = tell
        self._lost = self._lost_told = 0
        self._error = ""
        self._told: float | None = None
        self._asked = self._is_made = False
        self._tried = threading.Event()
        self._once: Callable[[], Any] | None = None
        self._work: queue.Queue[Callable[[], Any] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._follow, name=f"log-{self.kind}", daemon=True)
        self._thread.start()

    @property
    def _own(self) -> Any:
        """The logger's own methods."""
        return super()

    @property
    def experiment(self) -> Any:
        """The logger's own object; one that does nothing as long as its server gave none.

        Lightning asks for it in the training thread, before the first step.
        """
        if not self.has_experiment:
            raise AttributeError(f"{self.kind} has no experiment")
        if self._thread is None or threading.current_thread() is self._thread:
            made = self._own.experiment
            self._is_made = True
            return made
        if not self._asked:
            self._asked = True
            self.later(self._make)
            self._tried.wait(_READY_S)
        return self._own.experiment if self._is_made else DummyLogger().experiment

    def _make(self) -> None:
        try:
            _ = self.experiment
        finally:
            self._tried.set()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log values of a step, soon."""
        values = dict(metrics)
        self.later(lambda: self._own.log_metrics(values, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log settings, soon."""
        self.later(lambda: self._own.log_hyperparams(*args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Log the model's graph, now: the steps would change what is looked at."""
        self._try(lambda: self._own.log_graph(*args, **kwargs))

    def save(self) -> None:
        """Write what is buffered, soon."""
        self.later(lambda: self._own.save())

    def finalize(self, status: str) -> None:
        """Close the logger, when it has done what is left; a while later without it."""
        assert self._thread is not None
        limit_s = _CLOSE_S if status == "success" else _CLOSE_FAILED_S
        with contextlib.suppress(queue.Full):
            self._work.put(lambda: self._own.finalize(status), timeout=limit_s)
            self._work.put(None, timeout=limit_s)
            self._thread.join(timeout=limit_s)
        if self._thread.is_alive():
            # One is under way; two of those that wait only end the thread.
            self._say("it did not end in time", lost=self._lost + max(0, self._work.qsize() - 1))
        elif self._lost > self._lost_told:
            self._say(self._error, lost=self._lost)

    def once_it_works(self, do: Callable[[], Any]) -> None:
        """Do something in its thread, after the first entry that its server took."""
        self._once = do

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
            if self._try(do) and self._once is not None:
                with contextlib.suppress(Exception):  # the next entry may have more luck
                    self._once()
                    self._once = None

    def _try(self, do: Callable[[], Any]) -> bool:
        try:
            do()
        except Exception as error:  # a server that is gone must not end training
            self._fail(model.describe(error))
            return False
        return True

    def _fail(self, error: str) -> None:
        self._lost, self._error = self._lost + 1, error
        now = time.monotonic()
        if self._told is None or now - self._told >= _TELL_EVERY_S:
            self._told = now
            self._say(error, lost=self._lost)

    def _say(self, error: str, *, lost: int) -> None:
        self._lost_told = lost
        self._tell("logger_failed", logger=self.kind, error=error, lost=lost)


def patient(found: type[Logger], args: dict[str, Any], *, tell: Tell) -> Patient:
    """Build a logger of a class, made patient."""
    own = {"kind": found.__name__, "has_experiment": hasattr(found, "experiment")}
    built: Patient = type(found.__name__, (Patient, found), own)(**args)
    built.begin(tell)
    return built
