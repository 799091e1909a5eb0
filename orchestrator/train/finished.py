"""Driver side: whether a run has anything left to do, by its newest manifest. No torch, no Ray."""

from orchestrator.config import Config
from orchestrator.train.saving import checkpoint


def is_finished(config: Config, run: str) -> bool:
    """Return whether a run is trained and no validation beside it is out any more."""
    return is_trained(config, run) and not checkpoint.list_manifests(run)[-1].pending


def is_trained(config: Config, run: str) -> bool:
    """Return whether the run's newest checkpoint is its end, under this config."""
    manifests = checkpoint.list_manifests(run)
    if not manifests or not manifests[-1].done:
        return False
    last = manifests[-1]
    return last.done != "max_epochs" or last.epoch >= config.train.max_epochs
