"""Driver side: how a run ended: what `result.json` says."""

import contextlib
import time
from typing import Any

from orchestrator.config import Config
from orchestrator.run import append_event, read_events, read_result, write_result
from orchestrator.train import memory_limits
from orchestrator.train.account import account
from orchestrator.train.errors import Diverged
from orchestrator.train.saving import checkpoint
from orchestrator.train.timing.timeline import Events, last_sign, moment_of, since_submission

# What reading the images asked of buckets, of the counts that a manifest carries.
_STORAGE = ("requests", "retries", "bytes", "waited_s")


def result_of(run: str, config: Config) -> dict[str, Any]:
    """Return the result of a run that is trained, written again where it is not of its end."""
    last = checkpoint.list_manifests(run)[-1]
    with contextlib.suppress(ValueError):
        result = read_result(run) or {}
        if (result.get("steps"), result.get("stop_reason")) == (last.step, last.done):
            return result
    # Its driver was killed after the last commit, and nobody knows when.
    ended_at = last_sign(read_events(run), saved_at=last.stats.get("saved_at", 0.0))
    result = _result(run, config, now=ended_at)
    write_result(run, result)
    return result


def _stopping(last: checkpoint.Manifest) -> dict[str, Any] | None:
    """Return what early stopping saw and decided; None where it is off."""
    names = ("monitor", "mode", "best", "best_step", "validations", "waited", "reason")
    return {name: last.stopping[name] for name in names} if last.stopping else None


def close_diverged(run: str, config: Config, error: Diverged) -> Diverged:
    """Write `result.json` of a run that diverged, and return the error with its last checkpoint."""
    manifests = checkpoint.list_manifests(run)
    said = f"{error}; there is no checkpoint from before it."
    if manifests:
        said = f"{error}; the last good checkpoint is that of step {manifests[-1].step}."
    close_run(run, config, stop_reason="diverged", problem=said)
    return Diverged(said)


def close_failed(run: str, config: Config, problem: str) -> None:
    """Write `result.json` of a run that an error ended; the same command still goes on with it."""
    close_run(run, config, stop_reason="failed", problem=problem)


def close_run(
    run: str, config: Config, *, stop_reason: str = "", problem: str = ""
) -> dict[str, Any]:
    """Write `result.json` of a run that has just ended, and return it.

    Args:
        run: URI of the run's folder.
        config: the run.
        stop_reason: "diverged" or "failed", where training did not end by itself.
        problem: what happened then.
    """
    ended = {"stop_reason": stop_reason, "problem": problem} if stop_reason else {}
    result = {**_result(run, config, now=time.time()), **ended}
    write_result(run, result)
    append_event(run, "finished", stop_reason=result["stop_reason"], step=result["steps"])
    return result


def _result(run: str, config: Config, *, now: float) -> dict[str, Any]:
    """Return what the committed checkpoints and the events say of a run that ended at `now`."""
    manifests = checkpoint.list_manifests(run)
    monitor, mode = checkpoint.monitored(config.train.early_stopping)
    last = manifests[-1] if manifests else _nothing(config)
    best = checkpoint.best_of(manifests, monitor=monitor, mode=mode) or last
    events = read_events(run)
    starts = [event for event in events if event["event"] == "training"]
    decided: dict[str, Any] = next(
        (event for event in reversed(events) if event["event"] == "decided"), {}
    )
    train_s = max(last.stats["train_s"], 1e-9)
    return {
        "run": run,
        "stop_reason": last.done,
        "problem": "",
        "epochs": last.epoch,
        "steps": last.step,
        "samples_seen": last.position,
        "best": {**best.metrics, "step": best.step, "epoch": best.epoch},
        "final": last.metrics,
        "early_stopping": _stopping(last),
        "validations_missing": list(last.pending),
        "validations_skipped": sum(event["event"] == "validation_skipped" for event in events),
        "images_per_s": last.position / train_s,
        "data_wait_share": last.stats["wait_s"] / train_s,
        "restarts": max(0, len(starts) - 1),
        "preemptions": sum(event["event"] == "preempted" for event in events),
        "skipped_steps": int(last.stats.get("skipped_steps", 0)),
        "quarantined": int(last.stats["bad"]),
        "storage": {name: last.stats.get(name, 0) for name in _STORAGE},
        "wall_s": _wall_s(events, now),
        **account(events, last, config, now=now),
        "workers": last.world_size,
        "micro_batch": memory_limits.report(config, events, num_workers=last.world_size),
        "decisions": {
            "precision": decided.get("precision"),
            "strategy": decided.get("strategy"),
            "decode_slots": decided.get("decode_slots"),
        },
    }


def _nothing(config: Config) -> checkpoint.Manifest:
    """Return what stands for the last checkpoint of a run that ended before its first."""
    return checkpoint.Manifest(
        step=0, position=0, epoch=0, metrics={}, done="", world_size=config.scaling.max_workers,
        strategy="", precision="", config_digest="", index_digest="",
        stats={"train_s": 0.0, "wait_s": 0.0, "bad": 0}, files=(),
    )  # fmt: skip


def _wall_s(events: Events, now: float) -> float:
    """Return for how long a run has lived since it was submitted."""
    mine = since_submission(events)
    return max(0.0, now - moment_of(mine[0])) if mine else 0.0
