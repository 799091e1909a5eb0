"""Worker side: what all workers' steps add up to: the mean loss, and how many images were bad."""

import collections
from typing import Any

import pytorch_lightning as pl
import torch

from orchestrator.config import UserError
from orchestrator.data.batch import MicroBatch

# Fewer images than this, repeats in later epochs included, say little about a data set.
_JUDGED_AFTER = 10_000


def gather(trainer: pl.Trainer, mine: Any) -> list[Any]:
    """Return every worker's value, by rank; all workers call it."""
    gathered: list[Any] = [mine]
    if trainer.world_size > 1:
        gathered = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, mine)
    return gathered


class Tally:
    """Sums over this worker's micro-batches, reduced over all workers every few steps.

    Args:
        max_bad_fraction: share of images that may be bad before the run is stopped.
    """

    def __init__(self, *, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._loss_sum: torch.Tensor | float = 0.0
        self._loss_samples = 0
        self._good = self._bad = 0
        self._reasons = collections.Counter[str]()
        self.mean_loss: float | None = None
        """Over the samples of the last reduced steps; None before the first."""

    def add_loss(self, loss: torch.Tensor, samples: int, *, accumulation: int) -> None:
        """Add a micro-batch's mean loss as Lightning hands it over: divided by the accumulation.

        It stays on the device: reading it here would make a GPU wait at every micro-batch.
        """
        self._loss_sum = self._loss_sum + loss.detach().double() * accumulation * samples
        self._loss_samples += samples

    def add_images(self, batch: MicroBatch) -> None:
        """Count a micro-batch's good and bad images."""
        self._good += len(batch.ids)
        self._bad += len(batch.bad)
        self._reasons.update(entry["reason"].split(":")[0] for entry in batch.bad)

    def reduce(self, trainer: pl.Trainer) -> str | None:
        """Bring `mean_loss` up to date; return why the run must stop, the same on all workers."""
        mine = [float(self._loss_sum), self._loss_samples, self._good, self._bad]
        # Doubles hold counts exactly up to 2 ** 53.
        total = torch.tensor(mine, dtype=torch.float64, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        loss, samples, good, bad = total.tolist()
        self.mean_loss = loss / max(samples, 1)
        self._loss_sum, self._loss_samples = 0.0, 0
        if good + bad < _JUDGED_AFTER or bad <= self._max_bad_fraction * (good + bad):
            return None
        return (
            f"{bad:,.0f} of {good + bad:,.0f} images could not be decoded ({self._top(trainer)}), "
            f"more than data.max_bad_fraction={self._max_bad_fraction:g}; mend those that "
            "quarantine.parquet in the run's folder names, or raise it."
        )

    def _top(self, trainer: pl.Trainer) -> str:
        reasons = collections.Counter[str]()
        for counts in gather(trainer, dict(self._reasons)):
            reasons.update(counts)
        return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))


class TooManyBadImages(UserError):
    """More images than `data.max_bad_fraction` allows could not be decoded."""
