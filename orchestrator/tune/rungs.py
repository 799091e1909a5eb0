"""Which trials go on: asynchronous successive halving that knows trials end by themselves. Pure.

The rule is that of Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning",
arXiv:1810.05934, section 3.2 and Algorithm 2, in its stopping form: a trial that reaches a rung and
is outside the best 1 / reduction_factor of all that reached it ends there, instead of being paused.
Added to it: a trial that ended by its own early stopping or at its last epoch counts in every later
rung with its best value. Without that a poor trial that came first meets nobody up there.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from orchestrator.config import Mode

Reason = Literal["converged", "pruned", "max_budget", "failed"]
REASONS: tuple[Reason, ...] = ("converged", "pruned", "max_budget", "failed")
_COMPLETE = ("converged", "max_budget")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What becomes of a trial after a report."""

    decision: Literal["keep", "prune"]
    why: str = ""
    """Which rung was missed by how much; empty for keep."""


KEEP = Verdict("keep")


@dataclasses.dataclass
class _Trial:
    best: float = math.inf
    at_rung: dict[int, float] = dataclasses.field(default_factory=dict)
    reason: Reason | None = None


class Rungs:
    """What trials reached at grace_epochs * reduction_factor**k epochs, and who goes on.

    Values are compared as best so far, a smaller one being better inside (`mode` max is negated). A
    value that is not finite is worse than any other. Nothing here is random, and a report that is
    repeated (as after a restart) changes nothing.
    """

    def __init__(self, *, grace_epochs: int, reduction_factor: int, mode: Mode) -> None:
        assert grace_epochs >= 1
        assert reduction_factor >= 2
        self._grace_epochs = grace_epochs
        self._reduction_factor = reduction_factor
        self._sign = 1.0 if mode == "min" else -1.0
        self._trials: dict[int, _Trial] = {}

    def record(self, trial: int, *, epochs: int, value: float) -> Verdict:
        """Note a trial's value after so many epochs, fill each rung it now reached, and judge it.

        A report that jumps over rungs fills all of them, and the trial must hold at each.
        """
        state = self._trials.setdefault(trial, _Trial())
        state.best = min(state.best, self._sign * value if math.isfinite(value) else math.inf)
        verdict = KEEP
        for rung in self._rungs_up_to(epochs):
            if rung not in state.at_rung:
                state.at_rung[rung] = state.best
                missed = self._judge(trial, rung)
                verdict = missed if missed.decision == "prune" else verdict
        return verdict

    def finish(self, trial: int, reason: Reason) -> None:
        """Note that a trial ended. Complete ones count in later rungs; others only where they were.

        The first reason stands.
        """
        state = self._trials.setdefault(trial, _Trial())
        state.reason = state.reason or reason

    def best(self, trial: int) -> float | None:
        """Return a trial's best finite value so far."""
        state = self._trials.get(trial)
        return self._sign * state.best if state and math.isfinite(state.best) else None

    def _rungs_up_to(self, epochs: int) -> Iterator[int]:
        rung = self._grace_epochs
        while rung <= epochs:
            yield rung
            rung *= self._reduction_factor

    def _judge(self, trial: int, rung: int) -> Verdict:
        mine = self._trials[trial].at_rung[rung]
        others = [self._evidence(s, rung) for n, s in self._trials.items() if n != trial]
        values = [value for value in others if value is not None]
        num_kept = max(1, (len(values) + 1) // self._reduction_factor)
        # Equals all stay: which of them reported first is chance.
        num_better = sum(value < mine for value in values)
        if math.isinf(mine):
            return Verdict("prune", f"no finite value by epoch {rung}")
        if num_better < num_kept:
            return KEEP
        place = f"{num_better + 1} of {len(values) + 1}"
        return Verdict("prune", f"place {place} at epoch {rung}, where {num_kept} may go on")

    @staticmethod
    def _evidence(state: _Trial, rung: int) -> float | None:
        if rung in state.at_rung:
            return state.at_rung[rung]
        return state.best if state.reason in _COMPLETE else None
