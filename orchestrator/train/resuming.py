"""Driver side: whether what lies in a run's folder is of this run, before anything starts."""

from orchestrator import storage
from orchestrator.config import Config, UserError
from orchestrator.data.index import Index
from orchestrator.overrides import config_digest, differences, identity
from orchestrator.run import CONFIG_FILE
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.saving.shapes import check_shapes


def check_checkpoints(config: Config, index: Index, run: str) -> str | None:
    """Hold the run's checkpoints, if any, against the config, the data, the model and the epochs.

    Returns:
        the strategy of the checkpoint that the run goes on from, if there is one.

    Raises:
        UserError: the run cannot be resumed so.
    """
    manifests = checkpoint.list_manifests(run)
    if not manifests:
        return None
    last = manifests[-1]
    if last.index_digest != index.digest:
        raise UserError(
            f"{run} was trained on a data set with digest {last.index_digest[:12]} but "
            f"{index.uri} has {index.digest[:12]}; give this run another --name, or restore it."
        )
    _check_settings(config, run, last)
    _check_position(config, index, run, last)
    _check_epochs(config, index, run, last)
    check_shapes(config.model, run, last, num_classes=len(index.classes))
    return last.strategy


def _check_settings(config: Config, run: str, last: Manifest) -> None:
    """Hold the checkpoint against the config, which `config.yaml` does only where it is there."""
    changed = differences(last.settings, identity(config)) if last.settings else ""
    if not last.settings and not storage.exists(storage.join(run, CONFIG_FILE)):
        # Of an older version: its digest does not say what differs.
        changed = "" if last.config_digest == config_digest(config) else "its settings differ"
    if changed:
        raise UserError(
            f"the checkpoint of step {last.step} in {run} is of another config: {changed}; give "
            "this run another --name, or take the change back."
        )


def _check_position(config: Config, index: Index, run: str, last: Manifest) -> None:
    batch = config.data.global_batch
    # Only the last step of the last epoch may be short.
    is_end = last.position % index.splits["train"].samples == 0
    steps = -(-last.position // batch) if is_end else last.position / batch
    if steps != last.step:
        raise UserError(
            f"the checkpoint of step {last.step} in {run} says that {last.position} samples were "
            f"consumed, which are no {last.step} steps of data.global_batch={batch}; restore it, "
            "or give this run another --name."
        )


def _check_epochs(config: Config, index: Index, run: str, last: Manifest) -> None:
    total = config.train.max_epochs * index.splits["train"].samples
    if total < last.position:
        raise UserError(
            f"train.max_epochs={config.train.max_epochs} ends before the checkpoint of {run}, "
            f"which has completed {last.epoch} epochs; raise it."
        )
    short = last.position != last.step * config.data.global_batch
    if short and total > last.position and last.done == "max_epochs":
        raise UserError(
            f"train.max_epochs={config.train.max_epochs}: the last step of {run} was shorter than "
            f"data.global_batch={config.data.global_batch}, so a longer run has other steps; give "
            "it another --name."
        )
