"""Where in the stream a number of steps leads to. Pure."""

import dataclasses

from orchestrator.data.plan import Batching


@dataclasses.dataclass(frozen=True)
class Place:
    """Steps -> positions and epochs. A step may straddle two epochs; it belongs to the first."""

    batching: Batching
    samples_per_epoch: int

    def position(self, step: int) -> int:
        """Return how many samples the first `step` steps consume."""
        return min(step * self.batching.step_samples, self.batching.total)

    def epoch(self, step: int) -> int:
        """Return the epoch of the first sample after `step` steps."""
        return self.position(step) // self.samples_per_epoch

    def steps_left_in_epoch(self, step: int) -> int:
        """Return how many steps, from the next one on, start in its epoch."""
        end = (self.epoch(step) + 1) * self.samples_per_epoch
        return -(-end // self.batching.step_samples) - step

    def ends_epoch(self, step: int) -> bool:
        """Return whether step number `step` (from 1 on) consumed the last sample of its epoch."""
        epoch = (step - 1) * self.batching.step_samples // self.samples_per_epoch
        return self.position(step) >= (epoch + 1) * self.samples_per_epoch
