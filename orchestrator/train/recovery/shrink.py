"""Controller side: out of memory -> smaller micro-batches for the rest of the run.

The worker that ran out says so (`OutOfMemory`), the controller writes it among the run's events,
and every later start reads there how many samples may be pushed through the model at once, until
the user asks for another number. The global batch stays: what one micro-batch no longer holds is
accumulated. Light: the controller imports it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import ray.train

from orchestrator import cluster
from orchestrator.config import Config
from orchestrator.data.plan import Batching
from orchestrator.run import append_event, read_events
from orchestrator.storage import StorageError
from orchestrator.train.recovery.errors import OutOfMemory

EVENT = "out_of_memory"
MICRO_BATCH, EVAL_BATCH = "data.max_micro_batch", "data.eval_batch"
Limits = Mapping[str, int]
"""Setting -> most samples that fit at once, of the settings that had to be lowered."""


def limits_of(events: Iterable[Mapping[str, Any]], config: Config) -> dict[str, int]:
    """Return what a run's events say about its memory, while `config` asks for what it did then."""
    asked = _asked(config)
    limits: dict[str, int] = {}
    for event in events:
        if event["event"] == EVENT:
            setting, to = event["setting"], int(event["to"])
            if event.get("asked", asked[setting]) == asked[setting]:
                limits[setting] = min(to, limits.get(setting, to))
    return limits


def _asked(config: Config) -> dict[str, int]:
    return {MICRO_BATCH: config.data.max_micro_batch, EVAL_BATCH: config.data.eval_batch}


def describe(limits: Limits) -> str:
    """Return a line that says how a start is limited; empty if it is not."""
    said = ", ".join(f"{setting} is held at {most}" for setting, most in limits.items())
    return said and f"{said}: more ran out of memory; change it to try more"


def limited(config: Config, limits: Limits) -> Config:
    """Return the config with micro-batches as small as this run has learnt that they must be."""
    data = config.data
    lowered = dataclasses.replace(
        data,
        max_micro_batch=min(data.max_micro_batch, limits.get(MICRO_BATCH, data.max_micro_batch)),
        eval_batch=min(data.eval_batch, limits.get(EVAL_BATCH, data.eval_batch)),
    )
    return dataclasses.replace(config, data=lowered)


def report(
    config: Config, events: Iterable[Mapping[str, Any]], *, num_workers: int
) -> dict[str, int]:
    """Return what a result says: samples at once as the config asks for them, and as used."""
    lowered = limited(config, limits_of(events, config))
    return {
        "asked": _micro_batch(config, num_workers),
        "used": _micro_batch(lowered, num_workers),
        "eval_asked": config.data.eval_batch,
        "eval_used": lowered.data.eval_batch,
    }


def _micro_batch(config: Config, num_workers: int) -> int:
    data = config.data
    return Batching.for_training(
        total=data.global_batch,
        global_batch=data.global_batch,
        num_workers=num_workers,
        max_micro_batch=data.max_micro_batch,
    ).micro_batch


class RememberMemory(ray.train.UserCallback):  # type: ignore[misc]
    """Writes down in the controller what did not fit, before the workers start again.

    Args:
        run: URI of the run's folder.
        board: handle of the progress board actor.
        config: the run, as the user asks for it.
    """

    def __init__(self, run: str, board: Any, config: Config) -> None:
        self._run, self._board, self._config = run, board, config
        self._unwritten: object = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Remember the smaller size, and tell whoever watches."""
        for rank, error in worker_exceptions.items():
            cause = cluster.root_cause(error)
            if isinstance(cause, OutOfMemory):
                self._remember(cause, rank)
                return

    def _remember(self, error: OutOfMemory, rank: int) -> None:
        try:
            self._write(error, rank)
        except StorageError:
            # The run must go on, but not for ever: the next start meets it again.
            if self._unwritten == (error.setting, error.size):
                raise
            self._unwritten = (error.setting, error.size)

    def _write(self, error: OutOfMemory, rank: int) -> None:
        known, to = limits_of(read_events(self._run), self._config), error.smaller
        if known.get(error.setting, error.size) <= to:
            return
        self._board.say.remote(
            f"out of memory at step {error.step}: {error.setting} goes from {error.size} to {to}; "
            "the global batch stays"
        )
        append_event(
            self._run,
            EVENT,
            setting=error.setting,
            step=error.step,
            worker=rank,
            error=error.said,
            asked=_asked(self._config)[error.setting],
            **{"from": error.size, "to": to},
        )
