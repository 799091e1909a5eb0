"""Which group of a start's workers may commit: the newest one. No Ray.

Ray Train starts workers again by itself, under one lease: what is left of those before, on a node
that is cut off, must no longer commit. Not in the lease, which the driver's heart writes.
"""

import contextlib
import re

from orchestrator import storage
from orchestrator.storage import MissingError

_NAME = re.compile(r"workers-([0-9a-f]+)-\d+\.txt")


def announce(run: str, token: str, group: str) -> None:
    """Let a new group of a start's workers commit, and no earlier one; its controller calls it."""
    storage.write_atomic(_uri(run, token), group.encode())


def token_of(run: str, token: str) -> str:
    """Return the token of the group that was announced last: the start's, and more."""
    with contextlib.suppress(MissingError):
        return f"{token}/{storage.read_bytes(_uri(run, token)).decode()}"
    return token


def clear(run: str, *, driver: str) -> None:
    """Forget all groups but those of the driver that has the run: the others' may not commit."""
    for entry in list(storage.list_folder(run)):
        found = _NAME.fullmatch(entry.name)
        if found and found[1] != driver:
            storage.delete_file(storage.join(run, entry.name))


def _uri(run: str, token: str) -> str:
    return storage.join(run, f"workers-{token}.txt")
