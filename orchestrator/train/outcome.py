"""Driver side: how a run ended: what `result.json` says."""

import contextlib
from typing import Any

from orchestrator.config import Config
from orchestrator.run import append_event, read_events, read_result, write_result
from orchestrator.train import checkpoint

# What reading the images asked of buckets, of the counts that a manifest carries.
_STORAGE = ("requests", "retries", "bytes", "waited_s")


def result_of(run: str, config: Config) -> dict[str, Any]:
    """Return the result of a run that has ended, written again where it is missing or torn."""
    with contextlib.suppress(ValueError):
        if result := read_result(run):
            return result
    return close_run(run, config, wall_s=0.0)


def close_run(run: str, config: Config, *, wall_s: float) -> dict[str, Any]:
    """Write `result.json` from the committed checkpoints and the events, and return it."""
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
        "stop_reason": last.done,
        "epochs": last.epoch,
        "steps": last.step,
        "samples_seen": last.position,
        "best": {**best.metrics, "step": best.step, "epoch": best.epoch},
        "final": last.metrics,
        "images_per_s": last.position / train_s,
        "data_wait_share": last.stats["wait_s"] / train_s,
        "restarts": max(0, len(starts) - 1),
        "quarantined": int(last.stats["bad"]),
        "storage": {name: last.stats.get(name, 0) for name in _STORAGE},
        "wall_s": wall_s,
        "workers": last.world_size,
        "decisions": {
            "precision": decided.get("precision"),
            "strategy": decided.get("strategy"),
            "decode_slots": decided.get("decode_slots"),
        },
    }
    write_result(run, result)
    append_event(run, "finished", stop_reason=last.done, step=last.step)
    return result
