"""Controller side: which failures are worth another start. Light: the controller imports it."""

from typing import Any

import ray.train

from orchestrator import cluster
from orchestrator.config import UserError
from orchestrator.storage import StorageError


class StopAtMistakes(ray.train.UserCallback):  # type: ignore[misc]
    """Ends a run at a mistake of the user's, which another start would only meet again.

    What storage refuses is no such mistake: it may have passed by the next start.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the mistake: Ray Train's controller does not retry what its callbacks raise."""
        for error in worker_exceptions.values():
            cause = cluster.root_cause(error)
            if isinstance(cause, UserError) and not isinstance(cause, StorageError):
                raise UserError(cluster.sentence(cause))
