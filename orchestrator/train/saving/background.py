"""Worker side: one thread that does what the step loop must not wait for."""

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Background:
    """Runs jobs one after the other in a daemon thread: a stuck one cannot hold the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job, which reports its own failure; do it at once where the thread has ended."""
        if self._thread.is_alive():
            self._jobs.put(job)
        else:
            job()

    def close(self, timeout_s: float) -> bool:
        """End the thread after what is queued; return whether that was done in time."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a thread that ended would leave all later jobs undone
                _log.exception("a background job failed")
