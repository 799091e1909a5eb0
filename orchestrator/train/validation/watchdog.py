"""Worker side: notices that a validation gets nowhere, however long it takes. Pure."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

# A batch may take this many times as long as the longest before it; what comes before the first
# one, imports and the checkpoint among it, this many times the limit.
_PATIENCE = 10
_LOOKS = 10


class Watchdog:
    """Calls `end` once, from a thread of its own, where no batch ends for too long.

    Args:
        limit_s: how long a batch may take where the longest one took less than a tenth of that.
        end: what to do then.
    """

    def __init__(self, limit_s: float, end: Callable[[], object]) -> None:
        self._limit_s, self._end = limit_s, end
        self._since, self._longest_s = time.monotonic(), limit_s
        self._noted = False
        self._over = threading.Event()

    def note(self) -> None:
        """Note that a batch has ended."""
        now = time.monotonic()
        self._longest_s = max(now - self._since, self._longest_s if self._noted else 0.0)
        self._since, self._noted = now, True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the block."""
        self._since = time.monotonic()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _run(self) -> None:
        while not self._over.wait(self._limit_s / _LOOKS):
            if time.monotonic() - self._since > max(self._limit_s, _PATIENCE * self._longest_s):
                self._end()
                return
