"""Worker side: the background half of a checkpoint: write, checksum, upload, commit, prune.

Everything here but the constructor runs in the background thread, or says so.
"""

import contextlib
import dataclasses
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from orchestrator import storage
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE, append_events
from orchestrator.train.saving import checkpoint, lease, state
from orchestrator.train.saving.amendments import Amendments
from orchestrator.train.saving.background import Background
from orchestrator.train.saving.checkpoint import FileRecord, Manifest
from orchestrator.train.saving.journal import Metrics, Part, Quarantine, RunFacts, upload_logs
from orchestrator.train.saving.shares import Share, await_shares, write_share
from orchestrator.train.saving.staging import Staging

_log = logging.getLogger(__name__)
# Events that storage would not take are kept for the next try, up to this many.
_MAX_UNSAID = 10_000


@dataclasses.dataclass(frozen=True)
class Books:
    """What worker 0 keeps about the run and puts into every checkpoint."""

    metrics: Metrics
    quarantine: Quarantine
    upload_logs: Callable[[], None]
    say: Callable[[str], object]
    """Shows the user a line."""
    keep: int
    """Most recent checkpoints kept, besides the best one."""
    watch: tuple[str, str]
    """Metric and mode that say which checkpoint is the best."""


def open_books(
    facts: RunFacts, trainer: pl.Trainer, metrics: Metrics, resumed: Path | None
) -> Books:
    """Return the books of a run; `resumed` holds the files of the checkpoint it goes on from."""
    settings = facts.config.train
    return Books(
        metrics=metrics,
        quarantine=Quarantine(resumed),
        upload_logs=lambda: upload_logs(facts.run, trainer.logger),
        say=facts.board.say.remote,
        keep=settings.checkpoint.keep,
        watch=checkpoint.monitored(settings.early_stopping),
    )


@dataclasses.dataclass(eq=False)
class Attempt:
    """One save, as one worker sees it: written by its background thread, read by both."""

    save: str
    """Which save it is: records of other starts and tries do not count."""
    point: Manifest
    """The manifest but for its files."""
    captured: state.State
    """In host memory."""
    wait_for_copies: Callable[[], None]
    parts: list[Part]
    bad: tuple[dict[str, Any], ...]
    metrics: Metrics | None
    """Worker 0: what was logged up to this save."""
    stored: threading.Event = dataclasses.field(default_factory=threading.Event)
    """This worker's share is stored, or failed."""
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Nothing is left for this worker to do."""
    failed: str = ""
    abandoned: str = ""
    """Set by worker 0's training thread: another worker failed."""

    @property
    def step(self) -> int:
        """The step it is taken after."""
        return self.point.step


class Saver:
    """One worker's background thread and what it has achieved; the training thread only reads.

    Args:
        run: URI of the run's folder.
        rank: this worker.
        world_size: how many there are.
        books: what worker 0 puts into a checkpoint; None elsewhere.
        check_lease: raises a LeaseLostError where another start has the run now.
    """

    def __init__(
        self,
        run: str,
        *,
        rank: int,
        world_size: int,
        books: Books | None,
        check_lease: Callable[[], None],
    ) -> None:
        self._run = run
        self._check_lease = check_lease
        self._staging = Staging()
        self._rank = rank
        self._world_size = world_size
        self._books = books
        self._background = Background()
        self._unsaid: list[tuple[str, dict[str, Any]]] = []
        self._quarantine_stored = False
        self._amendments = Amendments(run, self._note)
        self.committed = -1
        """Worker 0: step of this start's last commit, -1 before the first."""
        self.failures = 0
        """Saves in a row that failed here."""
        self.num_failed = 0
        self.lost = ""
        """Worker 0: why nothing may be saved any more; empty: it may."""
        self.seconds = 0.0
        """Spent on saving, in this thread."""

    def submit(self, attempt: Attempt) -> None:
        """Begin a save; called by the training thread."""
        self._background.submit(partial(self._try, attempt))

    def amend(self, step: int, changes: dict[str, Any]) -> None:
        """Complete a committed checkpoint's manifest; called by worker 0's training thread."""
        assert self._books is not None
        metrics = self._books.metrics.frozen()

        def write() -> None:
            self._amendments.add(step, changes)
            self._amendments.write(self._check_lease)
            with contextlib.suppress(Exception):  # the next checkpoint brings the table
                storage.write_atomic(storage.join(self._run, METRICS_FILE), metrics.encode())

        self._background.submit(write)

    def tell(self, kind: str, **fields: Any) -> None:
        """Add an event to the run's once storage takes it; called by the training thread."""
        self._background.submit(partial(self._note, kind, **fields))

    def quarantine(self, bad: list[dict[str, Any]], *, timeout_s: float) -> None:
        """Write bad images down and wait for it; called by worker 0's training thread."""
        written = threading.Event()

        def write() -> None:
            assert self._books is not None
            try:
                self._add_bad(bad, self._books)
                self._say()
                location = storage.join(self._run, QUARANTINE_FILE)
                storage.write_atomic(location, self._books.quarantine.encode())
            finally:
                written.set()

        self._background.submit(write)
        written.wait(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Finish what is queued; return whether that was done in time."""
        closed = self._background.close(timeout_s)
        if closed:
            self._staging.close()
        return closed

    def _try(self, attempt: Attempt) -> None:
        began = time.perf_counter()
        try:
            self._check_lease()
            share = self._store(attempt)
            attempt.stored.set()
            if self._books is not None:
                self._commit(attempt, share, self._books)
            self.failures = 0
        except lease.LeaseLostError as error:
            # Nothing is deleted: what lies there may be the other start's.
            self.lost = attempt.failed = str(error)
        except Exception as error:  # whatever a storage client raises: the run goes on and says so
            self._give_up(attempt, " ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            self.seconds += time.perf_counter() - began
            attempt.stored.set()
            attempt.over.set()
        if self._books is not None and not attempt.failed:
            self._say()
            self._amendments.write(self._check_lease)
            self._tidy(self._books)

    def _store(self, attempt: Attempt) -> Share:
        attempt.wait_for_copies()
        uri = checkpoint.checkpoint_uri(self._run, attempt.step)
        folder = self._staging.folder()
        try:
            state.write_state(attempt.captured, folder)
            share = Share(tuple(checkpoint.store_files(folder, uri)), attempt.bad)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._check_lease()  # the upload took a while
        for part in attempt.parts:
            part.write(self._run)
        if self._rank != 0:
            write_share(uri, share, rank=self._rank, save=attempt.save)
        return share

    def _commit(self, attempt: Attempt, share: Share, books: Books) -> None:
        uri = checkpoint.checkpoint_uri(self._run, attempt.step)
        others = await_shares(
            uri,
            save=attempt.save,
            world_size=self._world_size,
            abandoned=lambda: attempt.abandoned,
        )
        shares = [share, *others]
        new = self._add_bad([row for one in shares for row in one.bad], books)
        assert attempt.metrics is not None
        tables = [self._store_table(uri, METRICS_FILE, attempt.metrics.encode(), at_root=True)]
        if len(books.quarantine):
            content, at_root = books.quarantine.encode(), new or not self._quarantine_stored
            tables.append(self._store_table(uri, QUARANTINE_FILE, content, at_root=at_root))
            self._quarantine_stored = True
        files = (*(record for one in shares for record in one.files), *tables)
        stats = {**attempt.point.stats, "bad": len(books.quarantine)}
        manifest = dataclasses.replace(attempt.point, files=files, stats=stats)
        self._check_lease()
        checkpoint.commit(self._run, manifest)
        self.committed = attempt.step

    def _store_table(self, uri: str, name: str, content: bytes, *, at_root: bool) -> FileRecord:
        """Write a table into the checkpoint, for a resume, and where people look for it."""
        storage.write_atomic(storage.join(uri, name), content)
        if at_root:
            storage.write_atomic(storage.join(self._run, name), content)
        return FileRecord(name, len(content), hashlib.sha256(content).hexdigest())

    def _add_bad(self, rows: list[dict[str, Any]], books: Books) -> bool:
        new = books.quarantine.add(rows)
        self._unsaid += [("quarantined", row) for row in new]
        return bool(new)

    def _give_up(self, attempt: Attempt, reason: str) -> None:
        attempt.failed = reason
        self.failures += 1
        self.num_failed += 1
        uri = checkpoint.checkpoint_uri(self._run, attempt.step)
        try:
            if self._rank == 0:
                # Half a checkpoint on a full disk would keep the next one from being written. Only
                # where it is ours: what lies there may be a later start's.
                self._check_lease()
                checkpoint.delete(self._run, attempt.step)
            else:
                write_share(uri, Share(failed=reason), rank=self._rank, save=attempt.save)
        except Exception as error:  # storage is failing: nothing more can be done there
            _log.debug("after a failed save: %r", error)
        if self._books is not None:
            line = f"checkpoint of step {attempt.step} failed ({self.failures} in a row): {reason}"
            _log.warning(line)
            self._books.say(f"{line}; training goes on")
            self._note("checkpoint_failed", step=attempt.step, count=self.failures, error=reason)

    def _tidy(self, books: Books) -> None:
        """Delete old checkpoints and copy logs; the run does not depend on it."""
        try:
            monitor, mode = books.watch
            manifests = checkpoint.list_manifests(self._run)
            best = checkpoint.best_of(manifests, monitor=monitor, mode=mode)
            checkpoint.prune(self._run, keep=books.keep, best=best)
            books.upload_logs()
        except Exception as error:  # as above
            _log.warning("cannot tidy up after a checkpoint: %s", error)
            self._note("tidying_failed", error=str(error))

    def _note(self, kind: str, **fields: Any) -> None:
        self._unsaid.append((kind, fields))
        self._say()

    def _say(self) -> None:
        try:
            if self._unsaid:
                append_events(self._run, self._unsaid)
            self._unsaid.clear()
        except Exception as error:  # as above; what is left is tried with the next event
            del self._unsaid[:-_MAX_UNSAID]
            _log.debug("cannot write events: %r", error)
