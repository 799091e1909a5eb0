"""Worker side: what each worker adds to a checkpoint, and how worker 0 learns that it is stored.

Through storage, where the checkpoint goes anyway: each worker writes a small record after its
files. Collectives would not do: a process group must not be used by two threads at once.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from orchestrator import storage
from orchestrator.train.saving.checkpoint import FileRecord

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 1.0


class SaveFailed(RuntimeError):
    """A checkpoint cannot be completed, because of another worker."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one worker stored, or why it could not."""

    files: tuple[FileRecord, ...] = ()
    bad: tuple[dict[str, Any], ...] = ()
    """Its bad images since the last commit."""
    failed: str = ""


def write_share(uri: str, share: Share, *, rank: int, save: str) -> None:
    """Leave a worker's record in the checkpoint's folder.

    Args:
        uri: the folder.
        share: what to say.
        rank: the worker.
        save: which save it belongs to: records of earlier starts and tries do not count.
    """
    content = json.dumps({"save": save, **dataclasses.asdict(share)}).encode()
    storage.write_atomic(storage.join(uri, _name(rank)), content)


def await_shares(
    uri: str, *, save: str, world_size: int, abandoned: Callable[[], str]
) -> list[Share]:
    """Wait for the records of workers 1, 2, ... and return them in order.

    Args:
        uri: the checkpoint's folder.
        save: which save they must belong to.
        world_size: how many workers there are.
        abandoned: returns why to give up, or an empty string.

    Raises:
        SaveFailed: a worker failed, or the save was abandoned.
    """
    found: dict[int, Share] = {}
    pause_s = _FIRST_PAUSE_S
    while len(found) < world_size - 1:
        there = {entry.name for entry in storage.list_folder(uri)}
        for rank in range(1, world_size):
            if rank not in found and _name(rank) in there:
                share = _read_share(storage.join(uri, _name(rank)), save)
                found |= {rank: share} if share else {}
        for rank, share in found.items():
            if share.failed:
                raise SaveFailed(f"worker {rank}: {share.failed}")
        if reason := abandoned():
            raise SaveFailed(reason)
        if len(found) < world_size - 1:
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
    return [found[rank] for rank in sorted(found)]


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _read_share(location: str, save: str) -> Share | None:
    fields = json.loads(storage.read_bytes(location))
    if fields.pop("save") != save:
        return None
    files = tuple(FileRecord(**record) for record in fields.pop("files"))
    return Share(files=files, bad=tuple(fields.pop("bad")), **fields)
