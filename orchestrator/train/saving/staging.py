"""Temporary files and folders of what is on its way to storage, which a kill does not leak."""

import fcntl
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "orchestrator-save-"
_LOCK = "lock"
# Nobody takes so long from making a folder to locking it, or from writing a file to renaming it.
_OLD_S = 60.0


class Staging:
    """A folder of this process; making one deletes those that killed processes left here.

    A file in it is locked as long as the process lives: process ids would not do, since containers
    may share the folder but not the ids.
    """

    def __init__(self) -> None:
        scratch = Path(tempfile.gettempdir())
        abandoned = [left for left in scratch.glob(f"{_PREFIX}*") if _is_abandoned(left)]
        stillborn = [left for left in scratch.glob(f".{_PREFIX}*") if is_old(left)]
        for left in [*abandoned, *stillborn]:
            shutil.rmtree(left, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._lock = (new / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only now: others delete what has this name and no lock.
        self._root = new.rename(new.with_name(new.name[1:]))

    def folder(self) -> Path:
        """Return a new folder for the files of one save."""
        return Path(tempfile.mkdtemp(dir=self._root))

    def close(self) -> None:
        """Delete all folders."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._lock.close()


def _is_abandoned(root: Path) -> bool:
    try:
        with (root / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # its process lives, or it is another user's
        return False


def is_old(path: Path) -> bool:
    """Return whether what is on its way has been so for too long: its process was killed."""
    try:
        return time.time() - path.stat().st_mtime > _OLD_S
    except OSError:  # it has its own name now, or was deleted
        return False
