"""Worker side: what becomes known about a checkpoint after its commit: a validation's metrics."""

import contextlib
from collections.abc import Callable
from typing import Any

from orchestrator import storage
from orchestrator.train.saving import checkpoint


class Amendments:
    """Completes manifests, and keeps what storage refuses for the next time.

    Args:
        run: URI of the run's folder.
        note: adds an event to the run's.
    """

    def __init__(self, run: str, note: Callable[..., None]) -> None:
        self._run = run
        self._note = note
        self._left: dict[int, dict[str, Any]] = {}

    def add(self, step: int, changes: dict[str, Any]) -> None:
        """Remember fields of a committed checkpoint's manifest and their new values."""
        self._left[step] = {**self._left.get(step, {}), **changes}

    def write(self, check: Callable[[], None]) -> None:
        """Write what is left to write, if `check` raises nothing."""
        try:
            for step, changes in list(self._left.items()):
                check()
                with contextlib.suppress(storage.MissingError):  # pruned meanwhile
                    checkpoint.amend(self._run, step, **changes)
                del self._left[step]
        except Exception as error:  # whatever a storage client raises: the run goes on
            self._note("amending_failed", steps=list(self._left), error=str(error))
