"""What the driver hands to every worker."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from orchestrator.config import Config
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.timing.startup import Startup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run, as its workers need to know it."""

    run: str
    config: Config
    strategy: Choice
    lease: str
    """Token of this start's lease on the run; see lease.py."""
    share: int
    """Runs that divide the cluster between them."""
    may_grow: bool
    """Whether the cluster might add nodes."""
    board: Any
    """Handle of the progress board actor."""
    import_paths: list[str]
    """Folders of the driver that the user's module may be imported from."""
    startup: Startup
    """The phases of the start so far."""
    validation: Any = None
    """Handle of the process that validates beside training; None: the workers validate."""
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Setting -> most samples at once, of those that ran out of memory; `config` has them."""
    resize_every_s: float = 60.0
    """Seconds of training before an elastic run looks whether there is room for more workers."""
