"""Worker side: what Ray Train calls in every worker.

A module of its own, and light: so that it can note when the worker's process was ready.
"""

from typing import Any

from orchestrator.train.timing.startup import Startup, importing


def run_worker(payload: dict[str, Any]) -> None:
    """Train; `payload` holds the pickled `job`, and the phases of the start so far."""
    startup: Startup = payload["startup"]
    startup.mark("workers")
    with importing():
        from orchestrator.train.worker import train_worker
    train_worker(payload["job"], startup)
