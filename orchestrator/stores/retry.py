"""How this process asks storage again: which pause, for how long, how fast, and what it has cost.

Pure: clock, sleep and random numbers are given, so every rule is tested without a server.
"""

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.stores.faults import OutageError, TransientError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long one request is repeated before the caller is told: ten minutes of outage."""
# Full jitter, see aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter. At 5 s a whole
# outage of a minute costs a thread about 30 tries, and work goes on 2.5 s (mean) after it ends.
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
# A few 503s are everyday; what lasts longer than this is worth a line, but one in ten seconds.
_NOTICE_S = 3.0
_NOTICE_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What this process has asked of storage so far."""

    requests: int = 0
    """Requests sent, repeated ones included."""
    retries: int = 0
    """Requests that repeated a failed one."""
    bytes: int = 0
    """Bytes of content received whole."""
    waited_s: float = 0.0
    """Seconds spent in pauses before requests, added up over threads."""

    def __add__(self, other: "Traffic") -> "Traffic":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(mine + yours for mine, yours in pairs))


class Rate:
    """Requests/s this process allows itself: no limit until storage says it is too much.

    Once a second: where requests were refused, the limit becomes 1.3 x what was served, but at
    least half of what was sent; where none was, it climbs by a quarter. So a burst of refusals
    halves the rate within a second or two, while a store that refuses one request in five
    whatever the rate (which fewer requests would not help) is not starved.
    """

    FLOOR_PER_S = 1.0
    _INTERVAL_S = 1.0
    _CLIMB = 1.25
    _HEADROOM = 1.3
    # A limit this far above what is asked for limits nothing.
    _IDLE = 4.0

    def __init__(
        self, clock: Callable[[], float], uniform: Callable[[float, float], float]
    ) -> None:
        self.limit_per_s: float | None = None
        self._clock = clock
        self._uniform = uniform
        self._lock = threading.Lock()
        self._since = clock()
        self._next = 0.0
        self._sent = self._served = self._refused = 0

    def take(self) -> float:
        """Take the next place in the queue; return the seconds to wait for it."""
        with self._lock:
            now = self._clock()
            self._adapt(now)
            self._sent += 1
            if self.limit_per_s is None:
                return 0.0
            place = max(now, self._next)
            self._next = place + self._uniform(0.5, 1.5) / self.limit_per_s
            return place - now

    def note(self, *, refused: bool) -> None:
        """Tell how a request ended: refused for being one too many, or served."""
        with self._lock:
            self._adapt(self._clock())
            self._refused += refused
            self._served += not refused

    def _adapt(self, now: float) -> None:
        elapsed = now - self._since
        if elapsed < self._INTERVAL_S:
            return
        sent, served = self._sent / elapsed, self._served / elapsed
        limit = self.limit_per_s
        if self._refused:
            used = sent if limit is None else min(sent, limit)
            most = sent if limit is None else self._CLIMB * limit
            wanted = min(most, max(used / 2, self._HEADROOM * served))
            self.limit_per_s = max(self.FLOOR_PER_S, wanted)
        elif limit is not None and self._served:
            limit = limit * self._CLIMB + 1
            self.limit_per_s = None if limit > max(20.0, self._IDLE * sent) else limit
        self._since, self._sent, self._served, self._refused = now, 0, 0, 0


class Patience:
    """Repeats requests for one process: its threads share the rate, the counts and the log line."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.rate = Rate(clock, uniform)
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform
        self._lock = threading.Lock()
        self._traffic = Traffic()
        self._noticed = float("-inf")
        self._served_at = float("-inf")
        self._silent = False

    @property
    def traffic(self) -> Traffic:
        """The totals so far; they only grow."""
        return self._traffic

    def call(self, request: Callable[[], T], *, what: str, remedy: str, patience_s: float) -> T:
        """Return what `request` returns, repeating it while it raises TransientError.

        Args:
            request: sends one request.
            what: names the place in log lines and errors, such as "s3://bucket/folder".
            remedy: what a person can do, at the end of the error's sentence.
            patience_s: seconds after the first failure from which no try is made.

        Raises:
            OutageError: it still fails after `patience_s`.
        """
        failed_at: float | None = None
        for tries in range(1, 1_000_000):
            self._pause(self.rate.take(), retry=tries > 1)
            try:
                done = request()
            except TransientError as error:
                self.rate.note(refused=error.slow)
                now = self._clock()
                failed_at = now if failed_at is None else failed_at
                pause = self._uniform(
                    0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(tries, 9))
                )
                if now + pause - failed_at > patience_s:
                    raise OutageError(
                        f"{what} does not answer ({error}; {tries} tries in {now - failed_at:.0f} "
                        f"s); {remedy}, then submit again."
                    ) from error
                self._notice(what, error, failed_at=failed_at, pause=pause, tries=tries)
                self._count(waited_s=pause)
                self._sleep(pause)
            else:
                self.rate.note(refused=False)
                self._note_served(what, failed_at)
                return done
        raise AssertionError("patience is bounded by time")

    def received(self, num_bytes: int) -> None:
        """Count content that arrived whole."""
        self._count(bytes=num_bytes)

    def _pause(self, seconds: float, *, retry: bool) -> None:
        self._count(requests=1, retries=int(retry), waited_s=seconds)
        if seconds > 0:
            self._sleep(seconds)

    def _count(
        self, *, requests: int = 0, retries: int = 0, bytes: int = 0, waited_s: float = 0.0
    ) -> None:
        with self._lock:
            self._traffic += Traffic(requests, retries, bytes, waited_s)

    def _note_served(self, what: str, failed_at: float | None) -> None:
        with self._lock:
            self._served_at = self._clock()
            silent, self._silent = self._silent, False
        if silent and failed_at is not None:
            _LOG.warning("%s answers again after %.0f s", what, self._served_at - failed_at)

    def _notice(
        self, what: str, error: Exception, *, failed_at: float, pause: float, tries: int
    ) -> None:
        """Say that nothing is served: not for one unlucky request among others that are."""
        with self._lock:
            now = self._clock()
            quiet_s = now - max(failed_at, self._served_at)
            if quiet_s < _NOTICE_S or now - self._noticed < _NOTICE_EVERY_S:
                return
            self._noticed, self._silent = now, True
        _LOG.warning(
            "%s does not answer (%s; %d tries in %.0f s); next try in %.1f s",
            *(what, error, tries, now - failed_at, pause),
        )
