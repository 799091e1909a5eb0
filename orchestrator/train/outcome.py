"""Driver side: how a run ended: what `result.json` says."""

import contextlib
import time
from typing import Any

from orchestrator.config import Config
from orchestrator.run import append_event, read_events, read_result, write_result
from orchestrator.train.account import account
from orchestrator.train.recovery import shrink
from orchestrator.train.recovery.errors import Diverged
from orchestrator.train.saving import checkpoint

# What reading the images asked of buckets, of the counts that a manifest carries.
_STORAGE = ("requests", "retries", "bytes", "waited_s")


def result_of(run: str, config: Config) -> dict[str, Any]:
    """Return the result of a run that has ended, written again where it is missing or torn."""
    with contextlib.suppress(ValueError):
        if result := read_result(run):
            return result
    return close_run(run, config, wall_s=0.0)


def _stopping(last: checkpoint.Manifest) -> dict[str, Any] | None:
    """Return what early stopping saw and decided; None where it is off."""
    names = ("monitor", "mode", "best", "best_step", "validations", "waited", "reason")
    return {name: last.stopping[name] for name in names} if last.stopping else None


def close_diverged(run: str, config: Config, error: Diverged, *, wall_s: float) -> Diverged:
    """Write `result.json` of a run that diverged, and return the error with its last checkpoint."""
    manifests = checkpoint.list_manifests(run)
    if not manifests:
        return Diverged(f"{error}; there is no checkpoint from before it.")
    said = f"{error}; the last good checkpoint is that of step {manifests[-1].step}."
    close_run(run, config, wall_s=wall_s, diverged=said)
    return Diverged(said)


def close_run(run: str, config: Config, *, wall_s: float, diverged: str = "") -> dict[str, Any]:
    """Write `result.json` from the committed checkpoints and the events, and return it.

    Args:
        run: URI of the run's folder.
        config: the run.
        wall_s: seconds since it was submitted.
        diverged: how a loss or the weights stopped being numbers, if they did.
    """
    manifests = checkpoint.list_manifests(run)
    monitor, mode = checkpoint.monitored(config.train.early_stopping)
    last = manifests[-1]
    best = checkpoint.best_of(manifests, monitor=monitor, mode=mode) or last
    events = read_events(run)
    starts = [event for event in events if event["event"] == "training"]
    decided: dict[str, Any] = next(
        (event for event in reversed(events) if event["event"] == "decided"), {}
    )
    train_s = max(last.stats["train_s"], 1e-9)
    result = {
        "run": run,
        "stop_reason": "diverged" if diverged else last.done,
        "problem": diverged,
        "epochs": last.epoch,
        "steps": last.step,
        "samples_seen": last.position,
        "best": {**best.metrics, "step": best.step, "epoch": best.epoch},
        "final": last.metrics,
        "early_stopping": _stopping(last),
        "validations_skipped": sum(event["event"] == "validation_skipped" for event in events),
        "images_per_s": last.position / train_s,
        "data_wait_share": last.stats["wait_s"] / train_s,
        "restarts": max(0, len(starts) - 1),
        "preemptions": sum(event["event"] == "preempted" for event in events),
        "quarantined": int(last.stats["bad"]),
        "storage": {name: last.stats.get(name, 0) for name in _STORAGE},
        "wall_s": wall_s,
        **account(events, last, config, now=time.time()),
        "workers": last.world_size,
        "micro_batch": shrink.report(config, events, num_workers=last.world_size),
        "decisions": {
            "precision": decided.get("precision"),
            "strategy": decided.get("strategy"),
            "decode_slots": decided.get("decode_slots"),
        },
    }
    write_result(run, result)
    append_event(run, "finished", stop_reason=result["stop_reason"], step=last.step)
    return result
