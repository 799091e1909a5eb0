"""Who drives a run: its lease files, read; see lease.py, which writes them. No Ray."""

import dataclasses
import json
import os

from orchestrator import storage
from orchestrator.storage import MissingError
from orchestrator.train.saving.processes import born, machine

_PREFIX, _SUFFIX = "lease-", ".json"

held_here: set[str] = set()
"""Drivers of this very process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who drives a run."""

    driver: str
    """Unlike any other driver's."""
    start: int
    """How often it has started workers."""
    host: str
    machine: str
    """Names the process ids that `pid` is one of; empty where that cannot be known."""
    pid: int
    born: str
    """When the process began: process ids come back."""
    since: float
    """Seconds since 1970."""
    beat: float
    """The last heartbeat, in seconds since 1970."""

    @property
    def token(self) -> str:
        """What workers must find to commit."""
        return f"{self.driver}-{self.start}"


UNKNOWN = Holder(
    driver="", start=0, host="an unknown machine (its lease is damaged)", machine="", pid=0,
    born="", since=0.0, beat=0.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """A lease file: what it is called by, and what it says."""

    number: int
    holder: Holder


def is_here(holder: Holder) -> bool:
    """Return whether the holder's process ids are this machine's."""
    return holder.machine != "" and holder.machine == machine()


def is_dead(holder: Holder) -> bool:
    """Return whether the holder is known to have ended."""
    if not is_here(holder):
        return False
    if holder.pid == os.getpid():
        return holder.driver not in held_here
    return born(holder.pid) != holder.born


def newest(run: str) -> Entry | None:
    """Return the lease that counts: the one with the highest number."""
    found = numbers(run)
    if not found:
        return None
    number = max(found)
    try:
        return Entry(number, _decode(storage.read_bytes(uri(run, number))))
    except MissingError:
        return newest(run)  # released this moment


def numbers(run: str) -> list[int]:
    """Return the numbers of a run's lease files."""
    names = [e.name for e in storage.list_folder(run) if not e.is_folder]
    inner = [(name, name.removeprefix(_PREFIX).removesuffix(_SUFFIX)) for name in names]
    found = [(name, int(number)) for name, number in inner if number.isdecimal()]
    return [number for name, number in found if name == _name(number)]


def uri(run: str, number: int) -> str:
    """Return the URI of a lease file."""
    return storage.join(run, _name(number))


def _name(number: int) -> str:
    return f"{_PREFIX}{number:06d}{_SUFFIX}"


def _decode(content: bytes) -> Holder:
    """Return who has the run; a damaged lease is its driver's until that shows no sign of life."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return UNKNOWN


def encode(holder: Holder) -> bytes:
    """Return what a lease file holds."""
    return json.dumps(dataclasses.asdict(holder), indent=1).encode()
