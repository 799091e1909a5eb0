"""Controller side: remembers what ran out of memory, before the workers start again.

Light: the controller imports it.
"""

from typing import Any

import ray.train

from orchestrator import cluster
from orchestrator.config import Config
from orchestrator.storage import StorageError
from orchestrator.train import memory_limits
from orchestrator.train.errors import OutOfMemory


class RememberMemory(ray.train.UserCallback):  # type: ignore[misc]
    """Writes down what did not fit a worker; the next start reads it.

    Args:
        run: URI of the run's folder.
        board: handle of the progress board actor.
        config: the run, as the user asks for it.
    """

    def __init__(self, run: str, board: Any, config: Config) -> None:
        self._run, self._board, self._config = run, board, config
        self._unwritten: object = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Remember the smaller size, and tell whoever watches."""
        for rank, error in worker_exceptions.items():
            cause = cluster.root_cause(error)
            if isinstance(cause, OutOfMemory):
                self._remember(cause, rank)
                return

    def _remember(self, error: OutOfMemory, rank: int) -> None:
        try:
            memory_limits.remember(self._run, self._config, self._board, error, worker=rank)
        except StorageError:
            # The run must go on, but not for ever: the next start meets it again.
            if self._unwritten == (error.setting, error.size):
                raise
            self._unwritten = (error.setting, error.size)
