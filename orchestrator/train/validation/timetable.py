"""After which steps a run validates: a function of the position alone. Pure.

So the model is validated at the same samples at any world size and after any resume.
"""

import dataclasses

from orchestrator.train.place import Place


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The first step that passes a multiple of `every_samples`, and each epoch's last step."""

    place: Place
    every_samples: int | None

    def is_due(self, step: int) -> bool:
        """Return whether the model is validated after `step` steps."""
        return self._passes(step, self.place.samples_per_epoch) or (
            self.every_samples is not None and self._passes(step, self.every_samples)
        )

    def _passes(self, step: int, samples: int) -> bool:
        """Return whether step number `step`, from 1 on, reached a multiple of `samples`."""
        if step < 1:
            return False
        before, after = self.place.position(step - 1), self.place.position(step)
        return before // samples < after // samples

    def count_left(self, step: int, *, validated: bool) -> int:
        """Return how many validations a start that goes on from `step` steps has before it.

        Args:
            step: the checkpoint's.
            validated: whether it has the metrics of the validation that was due there, if one was.
        """
        return self.count_after(step) + (self.is_due(step) and not validated)

    def count_after(self, step: int) -> int:
        """Return how many validations are due after more than `step` steps.

        In as many operations as the run has epochs, however many validations there are.
        """
        batching, samples = self.place.batching, self.place.samples_per_epoch
        first = self.place.position(step) // samples + 1
        ends = {
            -(-epoch * samples // batching.step_samples)
            for epoch in range(first, batching.total // samples + 1)
        }
        if self.every_samples is None:
            return len(ends)
        alone = sum(not self._passes(end, self.every_samples) for end in ends)
        return alone + self._multiples_after(step, self.every_samples)

    def _multiples_after(self, step: int, samples: int) -> int:
        """Return how many steps after `step` reach a multiple of `samples`."""
        batching = self.place.batching
        if samples <= batching.step_samples:
            # Every whole step does; the last one may be short.
            whole = max(0, batching.num_steps - 1 - step)
            return whole + (step < batching.num_steps and self._passes(batching.num_steps, samples))
        return batching.total // samples - self.place.position(step) // samples
