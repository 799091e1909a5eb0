"""What a run has learnt not to fit a process's memory: events of its folder -> smaller batches.

Whoever runs out of memory says so among the run's events, and every later start reads there how
many samples may be pushed through the model at once, until the user asks for another number. The
global batch stays: what one micro-batch no longer holds is accumulated. No torch, no Lightning.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.config import Config
from orchestrator.data.plan import Batching
from orchestrator.run import append_event, read_events
from orchestrator.train.errors import OutOfMemory

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


def remember(run: str, config: Config, board: Any, error: OutOfMemory, *, worker: int) -> None:
    """Write down that a size did not fit, once, and tell whoever watches.

    Args:
        run: URI of the run's folder.
        config: the run, as the user asks for it.
        board: handle of the progress board actor.
        error: what did not fit.
        worker: whose memory it was; -1: that of the process that validates beside training.

    Raises:
        StorageError: the event could not be written.
    """
    known, to = limits_of(read_events(run), config), error.smaller
    if known.get(error.setting, error.size) <= to:
        return
    board.say.remote(
        f"out of memory at step {error.step}: {error.setting} goes from {error.size} to {to}; "
        "the global batch stays"
    )
    append_event(
        run,
        EVENT,
        setting=error.setting,
        step=error.step,
        worker=worker,
        error=error.said,
        asked=_asked(config)[error.setting],
        **{"from": error.size, "to": to},
    )
