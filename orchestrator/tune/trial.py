"""Trial side: the function that Tune runs for each trial, beside the sweep's driver."""

import concurrent.futures
import contextlib
import dataclasses
import os
from typing import Any

import ray
import ray.tune
from ray.exceptions import GetTimeoutError, RayActorError

from orchestrator import cluster
from orchestrator.config import Config, UserError
from orchestrator.train import launch
from orchestrator.train.errors import Diverged
from orchestrator.tune.mailbox import Forward, Mail
from orchestrator.tune.rungs import Reason

MESSAGE = "message"
_REASONS: dict[str, Reason] = {
    "converged": "converged",
    "max_epochs": "max_budget",
    "diverged": "failed",
}
_POLL_S = 0.3
_ABORT_TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True)
class Report:
    """A validation, as Tune hands it to the scheduler."""

    metrics: dict[str, Any]
    """What the workers reported: metrics, epoch, step, samples_seen."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A trial's last word."""

    reason: Reason
    why: str = ""
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Metrics of the run's best checkpoint, with its step and epoch."""
    epochs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What all trials of a sweep are told."""

    configs: tuple[Config, ...]
    """The run of each trial."""
    concurrent: int
    """Trials that share the cluster."""
    mailbox: Any
    """Handle of the mailbox actor."""
    import_paths: list[str]
    """Folders of the driver that the user's module may be imported from."""


def run_trial(point: dict[str, Any], plan: Plan) -> None:
    """Train one trial to its own end or until it is pruned, reporting each validation to Tune."""
    trial = int(point["trial"])
    _prepare_process(plan.import_paths)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        training = pool.submit(
            launch.fit,
            plan.configs[trial],
            callbacks=[Forward(plan.mailbox, trial)],
            show=False,
            share=plan.concurrent,
        )
        mail = _forward_reports(training, trial, plan.mailbox)
        if mail.pruned and not training.done():
            _abort(mail.controller)
    # Only this thread reports, and only now: nothing of the training is under way any more.
    ray.tune.report({MESSAGE: _outcome(training, mail)})


def _prepare_process(import_paths: list[str]) -> None:
    cluster.extend_imports(import_paths)
    # The controller passes on one report a poll, so by default an epoch lasts 2 s at least.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _forward_reports(
    training: "concurrent.futures.Future[launch.RunResult]", trial: int, mailbox: Any
) -> Mail:
    """Hand reports to Tune until training ends or the trial is to end."""
    while True:
        last = training.done()  # asked first: what was posted before the end is still taken
        mail: Mail = ray.get(mailbox.take.remote(trial))
        for metrics in mail.reports:
            ray.tune.report({MESSAGE: Report(metrics)})
        if last or mail.pruned:
            return mail
        concurrent.futures.wait([training], timeout=_POLL_S)


def _abort(controller: Any) -> None:
    """End training: its controller gives back the workers, their reservation and itself."""
    with contextlib.suppress(RayActorError, GetTimeoutError):
        ray.get(controller.abort.remote(), timeout=_ABORT_TIMEOUT_S)
    ray.kill(controller)


def _outcome(training: "concurrent.futures.Future[launch.RunResult]", mail: Mail) -> Ended:
    error = training.exception()
    if mail.pruned:
        return Ended("pruned")
    if error is None:
        run = training.result()
        why = "diverged: the watched metric became NaN or infinite"
        return Ended(
            _REASONS[run.stop_reason],
            why if run.stop_reason == "diverged" else "",
            run.best,
            int(run.result["epochs"]),
        )
    return failure(error)


def failure(error: BaseException) -> Ended:
    """Return the last word of a trial that an error ended: also a diverged one is only a trial."""
    line = cluster.sentence(error)
    if isinstance(error, Diverged):
        return Ended("failed", f"diverged: {line}")
    told = isinstance(error, UserError | launch.TrainingFailed)
    return Ended("failed", line if told else f"{type(error).__name__}: {line}")
