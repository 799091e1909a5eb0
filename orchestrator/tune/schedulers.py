"""Driver side: the rungs' decisions as a Ray Tune scheduler."""

from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestrator.config import UserError
from orchestrator.tune.results import Ledger
from orchestrator.tune.rungs import Reason, Rungs
from orchestrator.tune.trial import MESSAGE, Ended, Report


class EarlyStoppingAsha(FIFOScheduler):  # type: ignore[misc]
    """Tells trials whether they go on; without rungs each goes to its own end.

    A pruned trial is asked to end through the mailbox, not stopped by Tune: so it gives back its
    workers in order, its process serves the next trial, and Tune sees it return like any other.
    """

    def __init__(self, *, rungs: Rungs | None, ledger: Ledger, mailbox: Any) -> None:
        super().__init__()
        self._rungs = rungs
        self._ledger = ledger
        self._mailbox = mailbox
        self.problem: UserError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Keep our state out of Tune's own files: sweep.json holds what counts."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note a validation or a trial's last word; Tune itself never stops a trial."""
        number, message = int(trial.config["trial"]), result.get(MESSAGE)
        if isinstance(message, Report):
            self._judge(number, message.metrics)
        elif isinstance(message, Ended):
            self._end(number, message)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Note a trial whose process died."""
        lines = str(trial.get_error() or "").strip().splitlines() or ["no message"]
        self._finish(int(trial.config["trial"]), "failed", f"its process ended: {lines[-1]}")

    def _judge(self, number: int, metrics: dict[str, Any]) -> None:
        if self._ledger.metric not in metrics:
            self.problem = _unknown_metric(self._ledger.metric, metrics)
            raise self.problem
        if self._ledger.has_ended(number):
            return  # what a pruned trial still had under way
        value = self._ledger.report(number, metrics)
        if self._rungs is None:
            return
        verdict = self._rungs.record(number, epochs=int(metrics["epoch"]), value=value)
        if verdict.decision == "prune" and not metrics.get("done"):
            self._mailbox.prune.remote(number)
            self._finish(number, "pruned", verdict.why)

    def _end(self, number: int, last: Ended) -> None:
        if self._ledger.has_ended(number):
            return
        # A run that was complete before this sweep began has reported nothing.
        if self._ledger.metric in last.best:
            value = self._ledger.report(number, last.best)
            if self._rungs is not None:
                self._rungs.record(number, epochs=int(last.best["epoch"]), value=value)
        reason, why = last.reason, last.why
        if reason != "failed" and not self._ledger.has_value(number):
            # Early stopping also ends a run that diverged; nobody should read that as converged.
            reason, why = "failed", f"{self._ledger.metric} was never finite"
        self._finish(number, reason, why, epochs=last.epochs)

    def _finish(self, number: int, reason: Reason, why: str, *, epochs: int = 0) -> None:
        if self._rungs is not None:
            self._rungs.finish(number, reason)
        self._ledger.end(number, reason, why, epochs=epochs)


def _unknown_metric(metric: str, metrics: dict[str, Any]) -> UserError:
    logged = sorted(set(metrics) - {"step", "epoch", "samples_seen", "done"})
    return UserError(
        f"tune.metric={metric!r} is not logged at validation; what is logged there: "
        f"{', '.join(logged) or 'nothing'}. Name one of these, or log it in validation_step."
    )
