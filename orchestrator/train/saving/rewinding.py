"""Worker side: clear a run's folder of what a start must not find: worker 0 does it. No Ray."""

from orchestrator import storage
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import MANIFEST_FILE, checkpoint_uri, step_of

_PARTIAL = tuple(f".{name}." for name in (METRICS_FILE, QUARANTINE_FILE, MANIFEST_FILE))


def rewind(run: str, step: int) -> None:
    """Delete what lies beyond `step` (a kill or damage left it) and what was never committed."""
    for found in checkpoint.steps_of(run):
        uri = checkpoint_uri(run, found)
        if found > step or not storage.exists(storage.join(uri, MANIFEST_FILE)):
            checkpoint.delete(run, found)
        else:
            _clear(uri)
    samples = storage.join(run, "samples")
    for entry in list(storage.list_folder(samples)):
        if (step_of(entry.name) or 0) > step:
            storage.delete_folder(storage.join(samples, entry.name))
    _clear(run)


def _clear(folder: str) -> None:
    """Delete what was being written when its process was killed; buckets show no such thing."""
    for entry in list(storage.list_folder(folder)):
        if entry.name.startswith(_PARTIAL) and entry.name.endswith(".tmp"):
            storage.delete_file(storage.join(folder, entry.name))
