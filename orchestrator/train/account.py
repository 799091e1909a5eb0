"""Driver side: where a run's time went, and what held it back, for `result.json`. Pure."""

from collections.abc import Mapping
from typing import Any

from orchestrator.config import Config
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.timing.measured import Measured
from orchestrator.train.timing.timeline import (
    PRODUCTIVE,
    Events,
    allocated_s,
    allocated_until,
    from_stats,
    sessions,
    step_seconds,
)
from orchestrator.train.timing.verdict import judge


def account(events: Events, last: Manifest, config: Config, *, now: float) -> dict[str, Any]:
    """Return `time` (by part), `unattributed_s`, `allocated_s`, `ettr`, `redone_steps`, `verdict`.

    `allocated_s` is the wall time since the first allocation, without that between two
    submissions; the parts and what is unattributed add up to it. `ettr` is the share of it in which
    committed steps computed: forward, backward, communication and optimizer.

    Args:
        events: of the run.
        last: its last checkpoint.
        config: the run.
        now: when it ended, in seconds since 1970.
    """
    stats = _final_stats(events, last)
    saved_at = stats.get("saved_at", 0.0)
    spans = sessions(events, saved_at=saved_at, now=now)
    # Ending: workers are let go, Ray Train cleans up.
    ending_s = allocated_s(spans, saved_at, now)
    whole_s = allocated_until(stats) + ending_s if saved_at else ending_s
    seconds = from_stats(stats)
    measured = Measured(
        seconds=seconds,
        stats=stats,
        strategy=last.strategy,
        workers=last.world_size,
        epochs=last.epoch,
        restarts=sum(event["event"] == "training" for event in events) - 1,
        **_placed(events, config, last.world_size),
    )
    verdict = judge(measured, config).sentence if step_seconds(seconds) else None
    # Steps since the last checkpoint of a run that failed are lost.
    failed = bool(events) and events[-1]["event"] == "failed"
    seconds["restart" if failed else "other"] += ending_s if saved_at else 0.0
    return {
        "time": {part: round(each, 3) for part, each in seconds.items()},
        "unattributed_s": round(whole_s - sum(seconds.values()), 3),
        "allocated_s": round(whole_s, 3),
        "ettr": sum(seconds[part] for part in PRODUCTIVE) / whole_s if whole_s else None,
        "redone_steps": redone_steps(events),
        "verdict": verdict,
    }


def redone_steps(events: Events) -> int:
    """Return how many steps were done again after failures, as far as these had been shown."""
    redone, reached = 0, 0
    for event in events:
        if event["event"] == "failure":
            reached = max(reached, event.get("step") or 0)
        elif event["event"] == "training":
            redone, reached = redone + max(0, reached - event.get("step", 0)), 0
    return redone


def _final_stats(events: Events, last: Manifest) -> Mapping[str, float]:
    """Return the stats of the end of training: the last checkpoint was written before it."""
    trained = [event for event in events if event["event"] == "trained"]
    if trained and trained[-1]["step"] == last.step:
        return {**last.stats, **trained[-1]["stats"]}
    return last.stats


def _placed(events: Events, config: Config, workers: int) -> dict[str, Any]:
    """Return where the last start read, and how many micro-batches it accumulated."""
    known: dict[str, Any] = {}
    names = ("cpus", "spare_cpus", "slots", "accumulation")
    for event in events:
        known.update({k: event[k] for k in names if k in event})
    spare = known.get("cpus", 0.0) - config.reserved_cpus(workers)  # as of an older version
    return {
        "slots": known.get("slots", 1),
        "spare_cpus": known.get("spare_cpus", max(0.0, spare)),
        "accumulation": known.get("accumulation", 1),
        "ran_out": any(event.get("setting") == "data.max_micro_batch" for event in events),
    }
