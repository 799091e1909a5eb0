"""Clear a run's folder of what a start must not find. No Ray."""

from orchestrator import storage
from orchestrator.run import CONFIG_FILE, METRICS_FILE, QUARANTINE_FILE, RESULT_FILE
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import MANIFEST_FILE, checkpoint_uri, step_of
from orchestrator.train.saving.staging import is_old

# Written by none but the driver that has the run's lease, and its workers.
_OWN = tuple(f".{name}." for name in (CONFIG_FILE, METRICS_FILE, QUARANTINE_FILE, RESULT_FILE))


def rewind(run: str, step: int) -> None:
    """Delete what lies beyond `step` (a kill or damage left it) and what was never committed."""
    for found in checkpoint.steps_of(run):
        uri = checkpoint_uri(run, found)
        if found > step or not storage.exists(storage.join(uri, MANIFEST_FILE)):
            checkpoint.delete(run, found)
    samples = storage.join(run, "samples")
    for entry in list(storage.list_folder(samples)):
        if (step_of(entry.name) or 0) > step:
            storage.delete_folder(storage.join(samples, entry.name))
    clear_unfinished(run)


def clear_unfinished(run: str) -> None:
    """Delete what was being written to a run's folder when its process was killed.

    Nobody else may be writing to the run, but for its report or to get its lease.
    """
    if storage.is_remote(run):
        return  # buckets show no such thing
    root = storage.local_path(run)
    inner = [left for name in ("checkpoints/*", "stacks") for left in root.glob(f"{name}/.*.*.tmp")]
    own = [left for left in root.glob(".*.*.tmp") if left.name.startswith(_OWN) or is_old(left)]
    for left in [*inner, *own]:
        left.unlink(missing_ok=True)
