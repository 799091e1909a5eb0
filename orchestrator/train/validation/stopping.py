"""When a run stops by its validations: a rule told values in the order of their steps. Pure.

What it has seen so far is a small frozen value of primitives that every checkpoint carries, so that
the decision after a kill, a resume or on other workers is that of an undisturbed run.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from orchestrator.config import EarlyStoppingConfig, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """What the validations so far say."""

    validations: int = 0
    """How many there were."""
    best: float | None = None
    """Best finite value."""
    best_step: int | None = None
    """The step it was measured after, the earlier one of equals."""
    reference: float | None = None
    """Value that an improvement must beat by more than min_delta."""
    reference_step: int | None = None
    waited: int = 0
    """Validations in a row that did not beat it."""
    done: str = ""
    """Why the run stops ("converged" or "diverged"), or empty."""
    reason: str = ""
    """The same in a sentence."""

    def judge(self, rule: EarlyStoppingConfig, *, step: int, value: float) -> "Standing":
        """Return what to think after a validation of `step` found `value`.

        The first decision stands: values that arrive after it only change what is best.
        """
        seen = dataclasses.replace(self, validations=self.validations + 1)
        if _is_better(rule.mode, value, self.best):
            seen = dataclasses.replace(seen, best=value, best_step=step)
        if seen.done:
            return seen
        if not math.isfinite(value):
            return seen._stop("diverged", f"{rule.monitor} was {value} at step {step}")
        limit = rule.divergence_threshold
        if limit is not None and _sign(rule.mode) * value > _sign(rule.mode) * limit:
            why = f"{rule.monitor} was {value:.6g} at step {step}, worse than {limit:g}"
            return seen._stop("diverged", why)
        if _is_better(rule.mode, value, self.reference, by=rule.min_delta):
            return dataclasses.replace(seen, reference=value, reference_step=step, waited=0)
        seen = dataclasses.replace(seen, waited=self.waited + 1)
        return seen._stop("converged", seen._waited_for(rule)) if _is_over(rule, seen) else seen

    def _stop(self, done: str, reason: str) -> "Standing":
        return dataclasses.replace(self, done=done, reason=reason)

    def _waited_for(self, rule: EarlyStoppingConfig) -> str:
        by = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
        since = "" if self.reference_step is None else f" of step {self.reference_step}"
        to_beat = f"{rule.monitor} {self.reference:.6g}{since}"
        return f"{self.waited} validations in a row did not beat {to_beat}{by}"

    def record(self, rule: EarlyStoppingConfig | None) -> dict[str, Any]:
        """Return what a checkpoint carries, in primitives; nothing without early stopping."""
        if rule is None:
            return {}
        return {"monitor": rule.monitor, "mode": rule.mode, **dataclasses.asdict(self)}


def standing_of(record: Mapping[str, Any], rule: EarlyStoppingConfig | None) -> Standing | None:
    """Return what a checkpoint carried; None where that was about another metric, or nothing."""
    if rule is None or (record.get("monitor"), record.get("mode")) != (rule.monitor, rule.mode):
        return None
    names = {field.name for field in dataclasses.fields(Standing)}
    return Standing(**{name: value for name, value in record.items() if name in names})


def lightning_key(rule: EarlyStoppingConfig) -> str:
    """Return where older checkpoints hold the state of Lightning's EarlyStopping."""
    return f"EarlyStopping{ {'monitor': rule.monitor, 'mode': rule.mode}!r}"


def standing_of_lightning(state: Mapping[str, Any]) -> Standing:
    """Return what the state of Lightning's EarlyStopping says, which older checkpoints hold."""
    best = float(state["best_score"])
    known = best if math.isfinite(best) else None
    return Standing(best=known, reference=known, waited=int(state["wait_count"]))


def check_monitor(rule: EarlyStoppingConfig, metrics: Mapping[str, float]) -> None:
    """Hold the metrics of a validation against what early stopping watches.

    Raises:
        UserError: it is not among them.
    """
    if rule.monitor not in metrics:
        logged = ", ".join(metrics) or "nothing"
        raise UserError(
            f"train.early_stopping.monitor={rule.monitor!r} was not logged by the module's "
            f"validation_step, which logged {logged}; name a logged metric."
        )


def _is_over(rule: EarlyStoppingConfig, seen: Standing) -> bool:
    return seen.waited >= rule.patience


def _sign(mode: str) -> int:
    return 1 if mode == "min" else -1


def _is_better(mode: str, value: float, than: float | None, *, by: float = 0.0) -> bool:
    if not math.isfinite(value):
        return False
    return than is None or _sign(mode) * value + by < _sign(mode) * than
