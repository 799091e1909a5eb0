"""Driver side: whether a run has anything left to do, by its newest manifest. No torch, no Ray."""

from orchestrator.config import Config
from orchestrator.data.sources import read_data
from orchestrator.train.saving import checkpoint


def mark_end(config: Config, run: str) -> None:
    """Make the newest checkpoint the run's end where `train.max_epochs` was lowered to just that.

    Nothing is left to train then, and so nobody else to say that it was the last.
    """
    manifests = checkpoint.list_manifests(run)
    if not manifests or manifests[-1].done:
        return
    last, samples = manifests[-1], read_data(config.data).splits["train"].samples
    if last.position == config.train.max_epochs * samples:
        checkpoint.amend(run, last.step, done="max_epochs")


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
