"""Worker side: the Lightning callback that keeps a worker's timeline.

On CUDA kernels run behind the clock of the CPU, so there the timeline says where the CPU waited
for them; `gpu_clock` says what they were. Nothing here synchronises a device at each step.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl

from orchestrator.data.loader import Loader
from orchestrator.run import read_events
from orchestrator.train.tally import gather
from orchestrator.train.timing.ceiling import Ceiling
from orchestrator.train.timing.exchange import Exchange, exchange_of
from orchestrator.train.timing.gpu_clock import GpuClock
from orchestrator.train.timing.pace import Pace
from orchestrator.train.timing.timeline import (
    Part,
    allocated_until,
    from_stats,
    step_seconds,
    time_before,
    to_stats,
)


class Clocks(pl.Callback):
    """Tells a timeline what this worker does; the first of the callbacks.

    Args:
        run: URI of the run's folder.
        loader: this worker's training batches.
        pace: whose timeline it keeps; it is told of validations and commits.
        totals: the stats of the checkpoint that this start goes on from.
        step: the step that training starts at.
    """

    tell: Callable[..., object] | None = None
    """Adds an event to the run's without making the training thread wait for storage."""

    def __init__(
        self, run: str, loader: Loader, pace: Pace, totals: Mapping[str, float], *, step: int
    ) -> None:
        self._run = run
        self._loader = loader
        self._pace = pace
        self.timeline = pace.timeline
        self._totals = totals
        self._first_step = step
        self._events: list[dict[str, Any]] = []
        self._before = from_stats(totals)
        self._began = False
        self._steps = 0
        self._exchange: Exchange | None = None
        self._gpu: GpuClock | None = None
        self._ceiling = Ceiling(loader, step=step)

    @property
    def saved_at(self) -> float:
        """When the checkpoint that this start goes on from was saved; 0: there is none."""
        return self._totals.get("saved_at", 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look what came before this start, and at how the workers exchange gradients."""
        if trainer.global_rank == 0:
            self._events = read_events(self._run)
        self._exchange = exchange_of(trainer.strategy, self.timeline)
        if trainer.strategy.root_device.type == "cuda":
            accumulation = self._loader.batching.accumulation
            self._gpu = GpuClock(self.timeline, accumulation=accumulation)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin forward and backward; with the first batch, end the start."""
        if not self._began:
            self._begin()
        self._account()
        self.timeline.enter("forward_backward")
        current = self._loader.current
        if self._gpu is not None and current is not None and current.ends_step:
            self._gpu.begin(self._steps)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Mark the end of the backward pass on a GPU."""
        if self._gpu is not None:
            self._gpu.mark()

    def _begin(self) -> None:
        self._began = True
        self._began_at = time.time()
        startup, restart = time_before(self._events, saved_at=self.saved_at, now=self._began_at)
        self._allocated_s = allocated_until(self._totals) + startup + restart
        self._before["startup"] += startup
        self._before["restart"] += restart
        self._waited_s, self._prepared_s = self._loader.waited_s, self._loader.prepared_s
        self.timeline.restart()

    def _account(self) -> None:
        """Take out of "other" what the loader knows better."""
        loader = self._loader
        self.timeline.move(loader.waited_s - self._waited_s, source="other", to="wait")
        # Moving, augmenting and normalising a batch is work of the training device.
        prepared = loader.prepared_s - self._prepared_s
        self.timeline.move(prepared, source="other", to="forward_backward")
        self._waited_s, self._prepared_s = loader.waited_s, loader.prepared_s

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """End the batch; some steps after the start, measure a few from memory."""
        self.timeline.enter("other")
        current = self._loader.current
        assert current is not None
        if current.ends_step:
            self._steps += 1
            if self._gpu is not None:
                self._gpu.mark()
            if self._ceiling.is_due(self._steps):
                self._ceiling.look(self._steps, self._seconds)
                self._account()

    def _seconds(self) -> dict[Part, float]:
        self._account()
        if self._exchange is not None:
            self._exchange.settle()
        if self._gpu is not None:
            self._gpu.settle(self._steps)
        return self.timeline.seconds

    def totals(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return what a checkpoint carries on, the mean of all workers; all of them call it.

        Besides the parts: `step_s`, `wait_s_of_step`, `exchange_s` (seconds of a step of this
        start: in all, for data on the worker that waits longest, for the exchange itself),
        `ceiling_s` (those of a step fed from memory), `slow_rank`, `slow_factor` (the worker that
        computes longest, and how much longer than the others' median), `workers` (whose steps
        these are), `saved_at`, `allocated_s` (all that was allocated until then).
        """
        carried = self._carried()
        if not self._began:
            return {**self._pace.totals, **self._reading, **carried}
        seconds = self._seconds()
        rows = gather(trainer, (seconds, self._ceiling.own_s, self._ceiling.exchange_s))
        parts = [row[0] for row in rows]
        mean = {part: statistics.fmean(each[part] for each in parts) for part in seconds}
        totals = {part: self._before[part] + mean[part] for part in mean}
        found = {**self._pace.totals, **self._reading, **carried, **to_stats(totals)}
        found["saved_at"] = now = time.time()
        found["allocated_s"] = self._allocated_s + now - self._began_at
        found["workers"] = len(rows)
        if self._steps:
            found["step_s"] = step_seconds(mean) / self._steps
            found["wait_s_of_step"] = max(each["wait"] for each in parts) / self._steps
            found["exchange_s"] = min(each["communication"] for each in parts) / self._steps
        if all(own is not None for _, own, _ in rows):
            found["ceiling_s"] = max(row[1] for row in rows) + min(row[2] for row in rows)
        return {**found, **_slowest([e["forward_backward"] + e["optimizer"] for e in parts])}

    def _carried(self) -> dict[str, float]:
        """Return what still holds of the start before: its steps were others at another size."""
        same = self._totals.get("workers") == self._loader.batching.num_workers
        names = _CARRIED | _OF_STEPS if same else _CARRIED
        return {name: value for name, value in self._totals.items() if name in names}

    @property
    def _reading(self) -> dict[str, float]:
        now = dataclasses.asdict(self._loader.costs)
        return {name: self._totals.get(name, 0) + value for name, value in now.items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write down what the last save still cost."""
        found = self.totals(trainer)
        if trainer.global_rank == 0 and self._began and self.tell is not None:
            step = self._first_step + self._steps
            self.tell("trained", step=step, stats=found)


_CARRIED = {"saved_at", "allocated_s", *to_stats(from_stats({}))}
_OF_STEPS = {
    "step_s", "wait_s_of_step", "exchange_s", "ceiling_s", "slow_rank", "slow_factor", "workers",
}  # fmt: skip


def _slowest(computed: list[float]) -> dict[str, float]:
    if len(computed) < 2:
        return {}
    rank = max(range(len(computed)), key=computed.__getitem__)
    others = statistics.median(s for r, s in enumerate(computed) if r != rank)
    return {"slow_rank": rank, "slow_factor": computed[rank] / max(others, 1e-9)}
