"""What a sweep found: its rows, and the files of its folder. Pure but for reading and writing."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from orchestrator import storage
from orchestrator.config import Config, Mode, TuneConfig
from orchestrator.overrides import to_dict
from orchestrator.progress import format_duration, printable
from orchestrator.templates import cell
from orchestrator.tune.rungs import Reason
from orchestrator.tune.space import Point, trial_config

SWEEP_FILE = "sweep.json"
BEST_FILE = "best.yaml"
REPORT_FILE = "report.md"
_BOOKKEEPING = ("step", "epoch", "samples_seen", "done")
_HEAD = ("trial", "ended", "epochs", "best", "settings", "why")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One trial."""

    trial: int
    overrides: Point
    run: str
    """URI of the trial's run."""
    reason: Reason | None = None
    """Why it ended; None while it has not."""
    why: str = ""
    """More about the reason: the rung that was missed, or what failed."""
    epochs: int = 0
    step: int = 0
    """Of its last validation."""
    best: float | None = None
    """Best finite value of the sweep's metric."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """All metrics of the validation with the best value."""
    curve: tuple[tuple[int, float], ...] = ()
    """(whole epochs, value of the sweep's metric) of each validation, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """How a sweep ended, or stands."""

    sweep: str
    """URI of the sweep's folder."""
    metric: str
    mode: Mode
    rows: tuple[Row, ...]
    wall_s: float

    @property
    def best(self) -> Row | None:
        """The row with the best finite value, the earlier one of equals; no failed trial's."""
        sign = 1 if self.mode == "min" else -1
        scored = [r for r in self.rows if r.best is not None and r.reason not in (None, "failed")]
        return min(scored, key=lambda r: (sign * (r.best or 0.0), r.trial), default=None)

    @property
    def finished(self) -> bool:
        """Whether every trial ended, and none by a failure, which another start may mend."""
        return all(row.reason not in (None, "failed") for row in self.rows)


class Ledger:
    """Keeps a sweep's rows while it runs, and writes them whenever a trial ends.

    Args:
        sweep: URI of the sweep's folder.
        tune: the config's section.
        rows: all trials, with what an earlier start left of them.
        say: shows a line to a person.
        wall_s: how long earlier starts took.
    """

    def __init__(
        self,
        sweep: str,
        tune: TuneConfig,
        rows: Sequence[Row],
        say: Callable[[str], None],
        *,
        wall_s: float = 0.0,
    ) -> None:
        self.metric = tune.metric
        self._sweep = sweep
        self._tune = tune
        self._rows = {row.trial: row for row in rows}
        self._say = say
        self._began = time.monotonic() - wall_s

    @property
    def result(self) -> SweepResult:
        """How the sweep stands."""
        return SweepResult(
            sweep=self._sweep,
            metric=self._tune.metric,
            mode=self._tune.mode,
            rows=tuple(self._rows.values()),
            wall_s=time.monotonic() - self._began,
        )

    def has_ended(self, trial: int) -> bool:
        """Return whether a trial has its reason."""
        return self._rows[trial].reason is not None

    def has_value(self, trial: int) -> bool:
        """Return whether a trial had a finite value."""
        return self._rows[trial].best is not None

    def report(self, trial: int, metrics: Mapping[str, Any]) -> float:
        """Note a validation and return its value of the sweep's metric."""
        row, value = self._rows[trial], float(metrics[self.metric])
        epochs, step = int(metrics["epoch"]), int(metrics["step"])
        # One that a restart did again counts once. Those within an epoch count, too: rungs compare
        # the best so far, and a sweep that is submitted again fills them from this curve.
        if step > row.step:
            curve = (*row.curve, (epochs, value))
            row = dataclasses.replace(row, epochs=max(epochs, row.epochs), step=step, curve=curve)
        sign = 1 if self._tune.mode == "min" else -1
        if math.isfinite(value) and (row.best is None or sign * value < sign * row.best):
            named = {k: float(v) for k, v in metrics.items() if k not in _BOOKKEEPING}
            row = dataclasses.replace(row, best=value, metrics=named)
        self._rows[trial] = row
        return value

    def end(self, trial: int, reason: Reason, why: str = "", *, epochs: int = 0) -> None:
        """Note why a trial ended; the first reason stands."""
        if self.has_ended(trial):
            return
        old = self._rows[trial]
        row = dataclasses.replace(old, reason=reason, why=why, epochs=max(epochs, old.epochs))
        self._rows[trial] = row
        self._say(describe_end(row, self.metric))
        self.write()

    def write(self) -> None:
        """Write `sweep.json`."""
        result = self.result
        content = {
            "sweep": self._sweep,
            "finished": result.finished,
            "best_trial": result.best.trial if result.best else None,
            "wall_s": result.wall_s,
            "tune": dataclasses.asdict(self._tune),
            "trials": [dataclasses.asdict(row) for row in result.rows],
        }
        location = storage.join(self._sweep, SWEEP_FILE)
        storage.write_atomic(location, json.dumps(_finite(content), indent=1).encode())


def _finite(value: Any) -> Any:
    # JSON has no NaN; a reader that is not Python refuses the whole file.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earlier:
    """What an earlier start of a sweep wrote down."""

    tune: dict[str, Any]
    rows: tuple[Row, ...]
    wall_s: float


def read_sweep(sweep: str) -> Earlier | None:
    """Return what a sweep's folder holds, or None where it holds no sweep."""
    location = storage.join(sweep, SWEEP_FILE)
    if not storage.exists(location):
        return None
    content = json.loads(storage.read_bytes(location))
    rows = tuple(Row(**{**row, "curve": _curve(row["curve"])}) for row in content["trials"])
    return Earlier(tune=content["tune"], rows=rows, wall_s=float(content["wall_s"]))


def _curve(points: list[list[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(e), math.nan if value is None else float(value)) for e, value in points)


def write_outcome(result: SweepResult, config: Config) -> None:
    """Write `report.md`, and `best.yaml` where a trial has a value."""
    lines = [f"# {cell(config.name)}", "", str(cell(describe_outcome(result))), ""]
    lines += ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * len(_HEAD)]
    for texts in _table(result):
        lines.append("| " + " | ".join(str(cell(text)) for text in texts) + " |")
    report = "\n".join(lines) + "\n"
    storage.write_atomic(storage.join(result.sweep, REPORT_FILE), report.encode())
    if result.best is not None:
        text = yaml.safe_dump(_best_config(result.best, config), sort_keys=False)
        storage.write_atomic(storage.join(result.sweep, BEST_FILE), text.encode())


def _best_config(best: Row, config: Config) -> dict[str, Any]:
    """Return the best trial's settings as a run of its own, beside the sweep."""
    plain = to_dict(trial_config(config, best.overrides, trial=best.trial))
    del plain["tune"]
    return {**plain, "name": f"{config.name}-best"}


def describe_end(row: Row, metric: str) -> str:
    """Return one line about a trial that ended."""
    value = "" if row.best is None else f": best {metric} {row.best:.4g}"
    why = f" ({row.why})" if row.why else ""
    return printable(f"trial {row.trial} {row.reason} after {_epochs(row.epochs)}{value}{why}")


def describe_outcome(result: SweepResult) -> str:
    """Return what came of a sweep in one line."""
    took = f"{len(result.rows)} trials in {format_duration(result.wall_s)}"
    if result.best is None:
        return f"{took}; none has a finite {result.metric}."
    best = f"trial {result.best.trial} with {result.metric} {result.best.best:.4g}"
    where = storage.join(result.sweep, BEST_FILE)
    return f"{took}; best: {best}. Train it with: orchestrator train --config {where}"


def format_table(result: SweepResult) -> str:
    """Return the sweep's table, best trial first, and its outcome, as text."""
    table = [_HEAD, *(tuple(printable(text) for text in row) for row in _table(result))]
    widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
    lines = ["  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)).rstrip() for r in table]
    return "\n".join([*lines, "", describe_outcome(result)])


def _table(result: SweepResult) -> list[tuple[str, ...]]:
    sign = 1 if result.mode == "min" else -1
    order = sorted(
        result.rows,
        key=lambda r: (math.inf if r.best is None else sign * r.best, r.trial),
    )
    return [
        (
            str(row.trial),
            str(row.reason or "not ended"),
            str(row.epochs),
            "-" if row.best is None else f"{row.best:.4g}",
            ", ".join(f"{path}={_short(value)}" for path, value in row.overrides.items()),
            row.why,
        )
        for row in order
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _epochs(count: int) -> str:
    return f"{count} epoch" if count == 1 else f"{count} epochs"
