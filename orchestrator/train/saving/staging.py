"""Worker side: a temporary folder for files on their way to storage, which a kill does not leak."""

import fcntl
import shutil
import tempfile
from pathlib import Path

_PREFIX = "orchestrator-save-"
_LOCK = "lock"


class Staging:
    """A folder of this process; making one deletes those that killed processes left here.

    A file in it is locked as long as the process lives: process ids would not do, since containers
    may share the folder but not the ids.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            if _is_abandoned(left):
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
