"""Worker side: the steps that fp16's loss scaling skips, counted without waiting for the device.

A scaled gradient that overflows is part of the method: its step changes nothing, the scale halves,
the next one fits. A gradient that is not finite at any scale would go on so for ever.
"""

from itertools import pairwise

import pytorch_lightning as pl
import torch

from orchestrator.train.strategies.strategy import ModelStrategy

MOST_IN_A_ROW = 40
"""From the largest number of fp16, 2**16, to its smallest, 2**-24: what does not fit after so many
halvings is infinite."""


class Skips:
    """Counts skipped steps; the same ones on every worker, whose gradients are equal.

    Args:
        before: those of earlier starts.
    """

    def __init__(self, before: int) -> None:
        self.total = before
        """Steps skipped since the run's first, as of the last look."""
        self.in_a_row = 0
        """The last steps, all of them skipped."""
        self._scale = 0.0
        self._scales: list[torch.Tensor] = []
        self._skipped: list[bool] = []

    def start(self, trainer: pl.Trainer) -> None:
        """Read the scale that training starts with."""
        self._scaler: torch.amp.GradScaler | None = getattr(
            trainer.precision_plugin, "scaler", None
        )
        if self._scaler is not None:
            self._scale = self._scaler.get_scale()

    def note(self, trainer: pl.Trainer) -> None:
        """Note a step that has ended."""
        if trainer.precision != "16-mixed":
            return
        if self._scaler is None:  # DeepSpeed scales, and knows on the CPU
            strategy: ModelStrategy = trainer.strategy  # type: ignore[assignment]  # ours
            self._skipped.append(strategy.has_skipped)
        elif self._scaler._scale is not None:
            self._scales.append(self._scaler._scale.detach().clone())

    def look(self) -> None:
        """Count what was noted since the last look."""
        if self._scales:
            scales = [self._scale, *torch.stack(self._scales).tolist()]
            self._scale = scales[-1]
            self._skipped = [after < before for before, after in pairwise(scales)]
        for skipped in self._skipped:
            self.total += skipped
            self.in_a_row = self.in_a_row + 1 if skipped else 0
        self._scales, self._skipped = [], []
