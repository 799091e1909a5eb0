"""What a report says: the outcome in one line and the tables. Pure: plain data in, text out."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from orchestrator import plots
from orchestrator.progress import format_duration
from orchestrator.run import EVALUATION_FILE, EVENTS_FILE, QUARANTINE_FILE

MAX_QUARANTINED = 20
_MAX_EVENTS = 100
_MAX_CLASSES = 1_000
_STOP_REASONS = {
    "converged": "converged: validation no longer improved",
    "max_epochs": "max_epochs: all epochs done",
    "diverged": "diverged: the watched metric became NaN or infinite",
}

_PARTS = {
    "wait": "waiting for data",
    "forward_backward": "forward and backward",
    "communication": "communication that steps wait for",
    "optimizer": "optimizer",
    "checkpoint": "checkpoints: pauses of the steps",
    "validation": "validation",
    "restart": "restarts, and steps done again",
    "startup": "start-up, up to the first batch",
    "other": "other: around the steps, and the end",
}


class Table(NamedTuple):
    """One section of the report."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run's folder holds; empty where a file is missing."""

    result: dict[str, Any]
    evaluation: dict[str, Any]
    events: list[dict[str, Any]]
    metrics: pa.Table | None
    quarantined: list[dict[str, Any]]
    """The first rows of the quarantine."""
    num_quarantined: int

    @property
    def best(self) -> dict[str, Any]:
        """Metrics, step and epoch of the best checkpoint."""
        return self.result.get("best") or {}


def describe_outcome(name: str, result: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Return what came of a run in one line."""
    quality = ""
    best = result.get("best") or {}
    if evaluation.get("accuracy") is not None:
        images = f"{evaluation.get('samples', 0):,} {evaluation.get('split', '')} images"
        quality = f"{_percent(evaluation['accuracy'])} accuracy on {images}"
    elif best.get("val_acc") is not None:
        quality = f"{_percent(best['val_acc'])} validation accuracy"
    if not result:
        return f"{name} has not finished" + (f"; so far {quality}." if quality else ".")
    after = f"after {result.get('epochs', '?')} epochs"
    if result.get("epochs") == 0:
        after = f"after {_number(result.get('steps'))} steps of the first epoch"
    if result.get("stop_reason") == "failed":
        return f"{name} failed {after}" + (
            f"; its best checkpoint has {quality}." if quality else "."
        )
    return f"{name}: {quality + ', ' if quality else ''}{result.get('stop_reason')} {after}."


def build_tables(files: RunFiles) -> Iterator[Table]:
    """Yield the sections of a report that there is something to say in."""
    yield Table("Result", ("", ""), list(_result_rows(files)))
    if files.result.get("time"):
        yield _time_table(files.result)
    metrics = _metric_rows(files.result)
    if metrics:
        yield Table("Metrics", ("metric", "best checkpoint", "at the end"), metrics)
    decisions = files.result.get("decisions") or {}
    if decisions:
        rows = [_decision(key, value) for key, value in decisions.items()]
        yield Table("Decisions", ("what", "choice", "why"), rows)
    if files.evaluation.get("classes"):
        yield _class_table(files.evaluation["classes"])
    if files.num_quarantined:
        yield _quarantine_table(files)
    if files.events:
        yield _event_table(files.events)


def _result_rows(files: RunFiles) -> Iterator[tuple[str, str]]:
    result, evaluation = files.result, files.evaluation
    rows = [
        ("Accuracy", _percent(evaluation.get("accuracy"))),
        ("Loss", _number(evaluation.get("loss"))),
        ("Measured on", _measured_on(evaluation)),
        ("Stopped", _stopped(result)),
        ("Early stopping", _stopping(result.get("early_stopping") or {})),
        ("Epochs", _number(result.get("epochs"))),
        ("Steps", _number(result.get("steps"))),
        ("Best checkpoint", _checkpoint(files.best)),
        ("Images trained on", _number(result.get("samples_seen"))),
        ("Training", _rate(result.get("images_per_s"))),
        ("Evaluation", _rate(evaluation.get("images_per_s"))),
        ("Waiting for data", _percent(result.get("data_wait_share"))),
        ("Read from buckets", _traffic(result.get("storage") or {})),
        ("Restarts", _number(result.get("restarts"))),
        ("Out of memory", _shrunk(result.get("micro_batch") or {})),
        ("Steps skipped by fp16", _number(result.get("skipped_steps") or None)),
        ("Quarantined images", _number(files.num_quarantined)),
        ("Wall time", _duration(result.get("wall_s"))),
    ]
    return ((name, str(value)) for name, value in rows if value is not None)


def _stopped(result: Mapping[str, Any]) -> str | None:
    reason = result.get("stop_reason")
    why = result.get("problem") or (result.get("early_stopping") or {}).get("reason")
    return f"{reason}: {why}" if why else _STOP_REASONS.get(str(reason), reason)


def _shrunk(found: Mapping[str, int]) -> str | None:
    names = {"": "micro-batches", "eval_": "batches of evaluation"}
    lowered = [
        f"{name} of {found[f'{key}used']} samples in place of {found[f'{key}asked']}"
        for key, name in names.items()
        if found and found[f"{key}used"] < found[f"{key}asked"]
    ]
    return ", ".join(lowered) or None


def _stopping(found: Mapping[str, Any]) -> str | None:
    if found.get("best_step") is None:
        return None
    best = f"best {found['monitor']} {_metric(found['monitor'], found['best'])}"
    return f"{best} at step {_number(found['best_step'])}, of {found['validations']} validations"


def _time_table(result: Mapping[str, Any]) -> Table:
    whole_s = max(result.get("allocated_s") or sum(result["time"].values()), 1e-9)
    parts = [*result["time"].items(), ("unattributed", result.get("unattributed_s", 0.0))]
    rows = [
        (_PARTS.get(part, part), f"{seconds:,.1f}", f"{100 * seconds / whole_s:.1f} %")
        for part, seconds in parts
    ]
    note = f"Of {whole_s:,.1f} s since the first allocation"
    if result.get("ettr") is not None:
        note += f", committed steps computed for {_percent(result['ettr'])} (ETTR)"
    return Table("Time", ("part", "seconds", "share"), rows, f"{note}.")


def _traffic(storage: Mapping[str, Any]) -> str | None:
    if not storage.get("requests"):
        return None
    return (
        f"{storage['bytes'] / 1e9:,.2f} GB in {storage['requests']:,} requests, "
        f"{storage['retries']:,} of them repeated; {storage['waited_s']:,.1f} s of pauses"
    )


def _metric_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    best, final = result.get("best") or {}, result.get("final") or {}
    names = [n for n in {**best, **final} if n not in ("step", "epoch")]
    return [(n, _metric(n, best.get(n)), _metric(n, final.get(n))) for n in names]


def _decision(key: str, value: Any) -> tuple[str, str, str]:
    choice, _, why = str(value).partition(": ")
    return key.replace("_", " "), choice, why


def _class_table(classes: list[dict[str, Any]]) -> Table:
    worst_first = sorted(classes, key=lambda c: (_sortable(c.get("accuracy")), str(c.get("name"))))
    rows = [
        (
            str(c.get("name")),
            _number(c.get("samples")) or "-",
            _number(c.get("correct")) or "-",
            _percent(c.get("accuracy")) or "-",
        )
        for c in worst_first[:_MAX_CLASSES]
    ]
    more = len(classes) - len(rows)
    note = "Worst first." + (f" {more:,} more are in {EVALUATION_FILE}." if more else "")
    return Table("Classes", ("class", "images", "correct", "accuracy"), rows, note)


def _sortable(value: Any) -> float:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.inf


def _quarantine_table(files: RunFiles) -> Table:
    rows = [(str(r.get("uri")), str(r.get("reason"))) for r in files.quarantined]
    note = f"{files.num_quarantined:,} images were left out of training and evaluation"
    hidden = files.num_quarantined > len(rows)
    note += f"; the first {len(rows)}, all in {QUARANTINE_FILE}:" if hidden else ":"
    return Table("Quarantined images", ("image", "reason"), rows, note)


def _event_table(events: list[dict[str, Any]]) -> Table:
    counts = collections.Counter(str(e.get("event")) for e in events)
    note = ", ".join(f"{kind}: {count:,}" for kind, count in counts.most_common())
    # Quarantined images have a section of their own and must not push a restart out of this one.
    listed = [e for e in events if e.get("event") != "quarantined"]
    if len(listed) > _MAX_EVENTS:
        note += f"; the last {_MAX_EVENTS}, all in {EVENTS_FILE}:"
    rows = [
        (str(e.get("time", ""))[:19].replace("T", " "), str(e.get("event")), _fields(e))
        for e in listed[-_MAX_EVENTS:]
    ]
    return Table("Events", ("time (UTC)", "event", ""), rows, note)


def _fields(event: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in event.items() if k not in ("time", "event"))


def _metric(name: str, value: Any) -> str:
    shown = _percent(value) if plots.group_of(name) == plots.ACCURACY else _number(value)
    return shown or "-"


def _number(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f} %"


def _rate(images_per_s: float | None) -> str | None:
    return None if images_per_s is None else f"{images_per_s:,.0f} images/s"


def _duration(seconds: float | None) -> str | None:
    return None if seconds is None else format_duration(seconds)


def _checkpoint(best: Mapping[str, Any]) -> str | None:
    if best.get("step") is None:
        return None
    if best.get("epoch") == 0:
        return f"step {_number(best['step'])}, within the first epoch"
    return f"step {_number(best['step'])}, epoch {_number(best.get('epoch'))}"


def _measured_on(evaluation: Mapping[str, Any]) -> str | None:
    if not evaluation:
        return None
    images = f"{_number(evaluation.get('samples'))} {evaluation.get('split')} images"
    how = f"{evaluation.get('checkpoint')} checkpoint, precision {evaluation.get('precision')}"
    return f"{images}, {how}"
