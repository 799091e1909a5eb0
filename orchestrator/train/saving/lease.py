"""Driver side: one driver at a time on one run, by a lease in the run's folder. No Ray.

`lease-<number>.json` says who drives the run; the highest number holds. Taking over is creating the
next number, which of several drivers only one can. Its content changes with every heartbeat, and
whenever the driver starts new workers: those of an earlier start, or of a driver that was taken
over from, find another token there and no longer commit.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.storage import StorageError
from orchestrator.train.saving import groups, holders
from orchestrator.train.saving.holders import UNKNOWN, Entry, Holder
from orchestrator.train.saving.processes import born, machine

BEAT_S = 10.0
EXPIRES_S = 60.0
"""Without a heartbeat for so long, a driver on another machine counts as dead."""
_LOOK_S = 1.0

_log = logging.getLogger(__name__)


class LeaseLostError(UserError):
    """Another driver, or a later start, has the run now."""


class Lease:
    """A lease that is held; its heart beats in a thread of its own."""

    def __init__(self, run: str, entry: Entry) -> None:
        self._uri = holders.uri(run, entry.number)
        self._run = run
        self._number = entry.number
        self._holder = entry.holder
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def renew(self) -> str:
        """Return a token for new workers; those of earlier starts can no longer commit.

        Raises:
            LeaseLostError: another driver has the run.
        """
        with self._lock:
            self._check_mine()
            self._write(dataclasses.replace(self._holder, start=self._holder.start + 1))
            return self._holder.token

    def release(self) -> None:
        """Give the run up: the next driver finds it free."""
        self._over.set()
        self._thread.join(timeout=EXPIRES_S)
        holders.held_here.discard(self._holder.driver)
        with contextlib.suppress(StorageError):  # it expires by itself
            _delete_up_to(self._run, self._number)
        if not storage.is_remote(self._run):
            with contextlib.suppress(OSError):  # it is not empty: something was begun
                storage.local_path(self._run).rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                with self._lock:
                    self._check_mine()
                    self._write(dataclasses.replace(self._holder, beat=time.time()))
            except LeaseLostError:
                return  # what is left of this run's workers finds out when it commits
            except Exception as error:  # a heart that stops gives a healthy run away
                _log.debug("no heartbeat: %s", error)

    def _check_mine(self) -> None:
        newest = holders.newest(self._run)
        damaged = Entry(self._number, UNKNOWN)  # writing it anew mends it
        if newest != damaged and (newest is None or newest.holder.driver != self._holder.driver):
            raise _lost(self._run, newest, driver=self._holder.driver)

    def _write(self, holder: Holder) -> None:
        storage.write_atomic(self._uri, holders.encode(holder))
        self._holder = holder


@contextlib.contextmanager
def held(run: str) -> Iterator[Lease]:
    """Hold a run's lease while the block runs.

    Raises:
        UserError: another driver trains this run.
    """
    lease = Lease(run, _acquire(run))
    try:
        yield lease
    finally:
        lease.release()


def clear(run: str) -> None:
    """Delete the lease of a driver that was killed when its run had ended."""
    newest = holders.newest(run)
    if newest is not None and holders.is_dead(newest.holder):
        _delete_up_to(run, newest.number)


def check(run: str, token: str) -> None:
    """Check that a start's workers may still commit.

    Raises:
        LeaseLostError: they may not.
        StorageError: storage does not tell.
    """
    start, _, group = token.partition("/")
    newest = holders.newest(run)
    if newest is not None and newest.holder == UNKNOWN:
        raise StorageError(
            f"{holders.uri(run, newest.number)} is damaged; its driver will mend it."
        )
    if newest is None or newest.holder.token != start:
        raise _lost(run, newest, driver=start.rpartition("-")[0])
    if group and groups.token_of(run, start) != token:
        raise _lost(run, newest, driver=newest.holder.driver)


def _lost(run: str, newest: "Entry | None", *, driver: str) -> LeaseLostError:
    if newest is None:
        return LeaseLostError(f"{run} was ended by its driver while these workers still ran.")
    holder = newest.holder
    if holder.driver == driver:
        return LeaseLostError(f"later workers of the same driver train {run}; leave it to those.")
    return LeaseLostError(
        f"{run} was taken over by process {holder.pid} on {holder.host}; leave it to that one."
    )


def _acquire(run: str) -> Entry:
    while True:
        newest = holders.newest(run)
        if newest is not None and not holders.is_dead(newest.holder):
            _await_death(run, newest)
        now = time.time()
        mine = Holder(
            driver=uuid.uuid4().hex,
            start=0,
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            born=born(os.getpid()),
            since=now,
            beat=now,
        )
        number = newest.number + 1 if newest else 1
        holders.held_here.add(mine.driver)  # before anyone can read it
        if storage.create(holders.uri(run, number), holders.encode(mine)):
            _delete_up_to(run, number - 1)
            return Entry(number, mine)
        holders.held_here.discard(mine.driver)


def _await_death(run: str, newest: Entry) -> None:
    """Return once the holder has shown no sign of life for as long as a lease lasts.

    Raises:
        UserError: it lives.
    """
    holder = newest.holder
    age_s = time.time() - holder.beat
    if holders.is_here(holder):
        raise _busy(run, holder, age_s)
    _log.warning(
        "%s was trained by process %d on %s; waiting up to %.0f s to see whether it still lives",
        run, holder.pid, holder.host, EXPIRES_S,
    )  # fmt: skip
    # By this machine's clock alone: the other one's may be wrong by hours.
    deadline = time.monotonic() + EXPIRES_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        now = holders.newest(run)
        if now is None:
            return
        if now != newest:
            raise _busy(run, now.holder, time.time() - now.holder.beat)


def _busy(run: str, holder: Holder, age_s: float) -> UserError:
    return UserError(
        f"{run} is being trained by process {holder.pid} on {holder.host} (last sign of life "
        f"{max(0.0, age_s):.0f} s ago); end that one, or give this run another --name."
    )


def _delete_up_to(run: str, number: int) -> None:
    numbers = holders.numbers(run)
    for found in numbers:
        if found <= number:
            storage.delete_file(holders.uri(run, found))
    # Another driver's, where this one lost the run.
    newest = holders.newest(run) if max(numbers, default=0) > number else None
    groups.clear(run, driver=newest.holder.driver if newest else "")
