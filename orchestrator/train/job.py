"""What the driver hands to every worker."""

import dataclasses
from typing import Any

from orchestrator.config import Config
from orchestrator.train.precision import Choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run, as its workers need to know it."""

    run: str
    config: Config
    strategy: Choice
    share: int
    """Runs that divide the cluster between them."""
    may_grow: bool
    """Whether the cluster might add nodes."""
    board: Any
    """Handle of the progress board actor."""
    import_paths: list[str]
    """Folders of the driver that the user's module may be imported from."""
