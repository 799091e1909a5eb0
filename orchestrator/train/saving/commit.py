"""Worker side: checkpoints that the step loop does not wait for: its half of them.

The training thread copies the state to host memory and goes on; each worker's background thread
writes, checksums and uploads its share, and worker 0's then writes the manifest. At most one save
is under way: one that falls due meanwhile is skipped and counted, except where it holds a
validation's metrics or is the last; those wait. What goes wrong is said, and tried again at the
next save; only `train.checkpoint.max_age_s` of it ends the run.
"""

import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.config import CheckpointConfig
from orchestrator.train.saving import state
from orchestrator.train.saving.checkpoint import CheckpointError, Manifest
from orchestrator.train.saving.journal import Consumed
from orchestrator.train.saving.lease import LeaseLostError
from orchestrator.train.saving.saver import Attempt, Books, Saver
from orchestrator.train.saving.snapshot import Snapshots

# A state so small is written in some 20 ms: waiting for it costs less than redoing steps would.
_SMALL_BYTES = 4 * 2**20
_SMALL_WAIT_S = 5.0
_ROUND_S = 30.0
# Between the tries of the last save, which nothing comes after.
_LAST_PAUSES_S = (1.0, 5.0)
_TOTALS = ("saves_skipped", "saves_failed", "save_pause_s", "save_s")

Capture = Callable[[], state.State]


@dataclasses.dataclass(frozen=True)
class _Word:
    """What a worker tells the others when a save is due."""

    busy: bool
    failed: str
    """Why its last attempt failed, if it did."""
    committed: int
    """Worker 0: step of the last commit, -1 before the first."""
    failures: int
    """Worker 0: saves in a row that failed."""
    age_s: float
    """Worker 0: seconds since the first save after the last commit began."""
    lost: str
    """Worker 0: why nothing may be saved any more, if so."""


class Committer:
    """Commits checkpoints of one worker of a run.

    Args:
        run: URI of the run's folder.
        rank: this worker.
        gather: a collective of the training threads: returns every worker's value, by rank.
        settings: how long to go on without a checkpoint.
        books: what worker 0 puts into a checkpoint; None elsewhere.
        totals: counts that the checkpoint resumed from brought along.
        check_lease: raises a LeaseLostError where another start has the run now.
    """

    def __init__(
        self,
        run: str,
        *,
        rank: int,
        gather: Callable[[Any], list[Any]],
        settings: CheckpointConfig,
        books: Books | None,
        totals: Mapping[str, float],
        check_lease: Callable[[], None] = lambda: None,
    ) -> None:
        starts: list[str] = gather(uuid.uuid4().hex[:8])
        self._run = run
        self._rank = rank
        self._gather = gather
        self._settings = settings
        self._books = books
        self._before = {name: totals.get(name, 0) for name in _TOTALS}
        self._start = starts[0]
        self._number = 0
        self._readable: set[type] = set()
        self._skipped = 0
        self._pause_s = 0.0
        self._snapshots = Snapshots()
        self._saver = Saver(
            run, rank=rank, world_size=len(starts), books=books, check_lease=check_lease
        )
        self._attempt: Attempt | None = None
        self._trying_since: float | None = None

    def save(
        self,
        point: Manifest,
        *,
        capture: Capture,
        consumed: Consumed,
        must: bool = False,
        last: bool = False,
    ) -> bool:
        """Begin a save of this moment; all workers call it at the same step.

        Args:
            point: the manifest but for its files.
            capture: returns this worker's state, by reference.
            consumed: what this worker consumed since the last commit.
            must: wait for the save before where that is under way, rather than skip this one.
            last: wait until it is committed, too.

        Returns:
            Whether it was begun, not skipped.

        Raises:
            CheckpointError: saving has failed for too long, or the last one failed.
        """
        began = time.perf_counter()
        free = self._is_free(consumed, must=must or last)
        if free:
            self._begin(point, capture, consumed)
        else:
            self._skipped += 1
        if last:
            self._see_through(point, capture, consumed)
        self._pause_s += time.perf_counter() - began
        return free

    def finish(self) -> int:
        """Wait for the save under way, on all workers; return the step of this start's last commit.

        It is -1 before the first.

        Raises:
            CheckpointError: saving has failed for too long.
        """
        heard = self._hear() if self._attempt is None else self._settle()
        return heard[0].committed

    @property
    def totals(self) -> dict[str, float]:
        """Since the run's first step: saves skipped and failed, seconds paused and saving."""
        saver = self._saver
        now = (self._skipped, saver.num_failed, self._pause_s, saver.seconds)
        return {name: self._before[name] + n for name, n in zip(_TOTALS, now, strict=True)}

    def amend(self, step: int, **changes: Any) -> None:
        """Complete the manifest of a committed checkpoint, off the training thread; on worker 0."""
        if self._books is not None:
            self._saver.amend(step, changes)

    @property
    def committed(self) -> int:
        """Step of this start's last commit so far, on worker 0; -1 before the first."""
        return self._saver.committed

    @property
    def num_bad(self) -> int:
        """Bad images that are written down so far; 0 on other workers than the first."""
        return len(self._books.quarantine) if self._books else 0

    def tell(self, kind: str, **fields: Any) -> None:
        """Add an event to the run's, off the training thread and once storage takes it."""
        self._saver.tell(kind, **fields)

    def quarantine(self, bad: list[dict[str, Any]]) -> None:
        """Write bad images down at once, on worker 0: the run is about to be stopped."""
        self._saver.quarantine(bad, timeout_s=self._settings.max_age_s)

    def close(self, timeout_s: float) -> bool:
        """Finish what is under way; return whether that was done in time."""
        return self._saver.close(timeout_s)

    def _is_free(self, consumed: Consumed, *, must: bool) -> bool:
        heard = self._hear()
        if any(word.busy for word in heard):
            if not must:
                return False
            heard = self._settle()
        self._forget(heard, consumed)
        return True

    def _hear(self) -> list[_Word]:
        """Exchange words; give up what cannot be completed, or the run where that lasts too long.

        All workers hear the same, so all raise or none does.
        """
        heard: list[_Word] = self._gather(self._word())
        if heard[0].lost:
            raise LeaseLostError(heard[0].lost)
        reasons = [f"worker {rank}: {w.failed}" for rank, w in enumerate(heard) if w.failed]
        if reasons and self._attempt is not None:
            self._attempt.abandoned = reasons[0]
        busy = any(word.busy for word in heard)
        if heard[0].age_s > self._settings.max_age_s and (busy or heard[0].failures > 1):
            raise self._too_old(heard[0], reasons)
        return heard

    def _word(self) -> _Word:
        attempt, committed = self._attempt, self._saver.committed
        if attempt is not None and attempt.over.is_set() and not attempt.failed:
            self._trying_since = None
        since = self._trying_since
        return _Word(
            busy=attempt is not None and not attempt.over.is_set(),
            failed=attempt.failed if attempt is not None else "",
            committed=committed,
            failures=self._saver.failures,
            age_s=0.0 if since is None else time.monotonic() - since,
            lost=self._saver.lost,
        )

    def _too_old(self, word: _Word, reasons: list[str]) -> CheckpointError:
        reason = reasons[0] if reasons else "the save under way does not end"
        return CheckpointError(
            f"no checkpoint could be saved for {word.age_s:.0f} s, longer than "
            f"train.checkpoint.max_age_s={self._settings.max_age_s:g} ({reason}); mend "
            f"{self._run} and submit the same command again to go on {_from(word)}."
        )

    def _settle(self) -> list[_Word]:
        """Wait until the save under way is over on all workers."""
        attempt = self._attempt
        assert attempt is not None
        # In rounds, which end by max_age_s: a worker that has stored its share must not wait in a
        # collective for one whose upload takes longer than collectives may.
        round_s = min(_ROUND_S, self._settings.max_age_s)
        for event in itertools.cycle((attempt.stored, attempt.over)):
            event.wait(round_s)
            heard = self._hear()  # so that worker 0 does not wait for a share that failed
            if not any(word.busy for word in heard):
                break
        return heard

    def _forget(self, heard: list[_Word], consumed: Consumed) -> None:
        attempt = self._attempt
        if attempt is not None and heard[0].committed == attempt.step:
            del consumed.bad[: len(attempt.bad)]
        self._attempt = None

    def _see_through(self, point: Manifest, capture: Capture, consumed: Consumed) -> None:
        """Wait until `point` is committed, trying again a few times.

        Raises:
            CheckpointError: it cannot be.
        """
        for pause_s in (*_LAST_PAUSES_S, None):
            heard = self._settle()
            self._forget(heard, consumed)
            if heard[0].committed == point.step:
                return
            if pause_s is not None:
                time.sleep(pause_s)
                self._begin(point, capture, consumed)
        reason = next((f"worker {i}: {w.failed}" for i, w in enumerate(heard) if w.failed), "")
        raise CheckpointError(
            f"the last checkpoint of {self._run}, of step {point.step}, could not be saved "
            f"({reason}); mend it and submit the same command again to go on {_from(heard[0])}."
        )

    def _begin(self, point: Manifest, capture: Capture, consumed: Consumed) -> None:
        captured = capture()
        kinds = state.kinds_in(captured)
        if not kinds <= self._readable:
            state.check_readable(captured)
            self._readable |= kinds
        copied = self._snapshots.take(captured)
        self._number += 1
        self._trying_since = self._trying_since or time.monotonic()
        self._attempt = attempt = Attempt(
            save=f"{self._start}-{self._number}",
            point=dataclasses.replace(point, stats={**point.stats, **self.totals}),
            captured=copied,
            wait_for_copies=self._snapshots.wait,
            parts=consumed.cut(point.step),
            bad=tuple(consumed.bad),
            metrics=self._books.metrics.frozen() if self._books else None,
        )
        self._saver.submit(attempt)
        if self._rank == 0 and self._snapshots.num_bytes <= _SMALL_BYTES:
            attempt.over.wait(_SMALL_WAIT_S)


def _from(word: _Word) -> str:
    return f"from step {word.committed}" if word.committed >= 0 else "from the last one there is"
