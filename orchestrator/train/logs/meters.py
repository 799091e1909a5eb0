"""Worker side: a run's numbers as Ray metrics, which Prometheus and Ray's Grafana boards read."""

import math
from collections.abc import Mapping

from ray.util.metrics import Gauge

# Name without the prefix -> what it says. All are gauges: a run that goes on after a failure goes
# on with its counts, where a counter would begin at 0 with each process.
_RUN_METERS = {
    "step": "Optimizer steps done.",
    "epoch": "Passes over the training data begun.",
    "samples_seen": "Samples that the steps consumed.",
    "images_per_s": "Images consumed per second by all workers.",
    "train_loss": "Mean training loss of the last logged steps.",
    "learning_rate": "Learning rate of the first parameter group.",
    "restarts": "Starts of the workers after the first, since the run was submitted.",
    "bad_images": "Images that could not be decoded.",
    "checkpoint_pause_seconds": "Seconds that steps waited for checkpoints, since the first step.",
    "checkpoint_save_seconds": "Seconds spent writing checkpoints beside the steps.",
    "checkpoint_failures": "Checkpoints that could not be saved.",
    "checkpoint_skipped": "Checkpoints skipped because the one before was not written yet.",
}
_WAIT_SHARE = "Share of a worker's training time spent waiting for data, 0 to 1."
_METRIC = "Newest value of a validation metric."


class Meters:
    """Gauges named orchestrator_*, tagged with the run; a worker's own with its rank too.

    Setting one costs some microseconds and sends nothing: Ray's agent collects them in turn.
    """

    def __init__(self, run: str, *, rank: int) -> None:
        self._run = {"run": run}
        self._worker = {"run": run, "rank": str(rank)}
        self._gauges = {
            name: Gauge(f"orchestrator_{name}", said, ("run",))
            for name, said in _RUN_METERS.items()
        }
        self._wait = Gauge("orchestrator_data_wait_share", _WAIT_SHARE, ("run", "rank"))
        self._metric = Gauge("orchestrator_validation", _METRIC, ("run", "metric"))

    def set(self, values: Mapping[str, float | None]) -> None:
        """Set the run's numbers, those that are known and finite."""
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[name].set(value, self._run)

    def set_wait_share(self, value: float | None) -> None:
        """Set this worker's share of waiting."""
        if value is not None:
            self._wait.set(value, self._worker)

    def set_metrics(self, values: Mapping[str, float]) -> None:
        """Set validation metrics by name."""
        for name, value in values.items():
            if math.isfinite(value):
                self._metric.set(value, {**self._run, "metric": name})
