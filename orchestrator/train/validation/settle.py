"""Driver side: the validations beside training that are still out when a run ends."""

import dataclasses
import io
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import Config
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE, append_event
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.saving.journal import Quarantine
from orchestrator.train.validation.beside import Outcome, Process, Questions
from orchestrator.train.validation.stopping import Standing, check_monitor, standing_of

# A node that went may be replaced: how often `train.hang_timeout_s` to wait for a place.
_PLACE_LIMITS = 10


def settle(run: str, config: Config, process: Process | None, board: Any) -> None:
    """Wait for the validations that are out at a run's end, and complete its checkpoints.

    Where the process that validates finds no place any more, they stay out: the same command
    submitted again asks for them.

    Raises:
        UserError: the metric that early stopping watches was not logged.
    """
    found = checkpoint.list_manifests(run)
    if process is None or not found or not found[-1].pending:
        return
    last, by_step = found[-1], {manifest.step: manifest for manifest in found}
    board.say.remote(f"training is done; waiting for {len(last.pending)} validations beside it")
    questions = Questions(process.handle)
    for step in last.pending:
        questions.ask(step)
    rule = config.train.early_stopping
    standing = standing_of(last.stopping, rule) or Standing()
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    limit_s = _PLACE_LIMITS * config.train.hang_timeout_s
    for outcome in _answers(questions, process, board, limit_s=limit_s):
        gone = "" if outcome.step in by_step else "its checkpoint was deleted"
        if outcome.failed or gone:
            error = outcome.failed or gone
            append_event(run, "validation_failed", step=outcome.step, error=error)
            continue
        bad += outcome.bad
        if rule is not None:
            check_monitor(rule, outcome.metrics)
            value = outcome.metrics[rule.monitor]
            standing = standing.judge(rule, step=outcome.step, value=value)
        rows += _rows(by_step[outcome.step], outcome.metrics)
        metrics, record = outcome.metrics, standing.record(rule)
        if outcome.step != last.step:
            checkpoint.amend(run, outcome.step, metrics=metrics, stopping=record, pending=())
        else:
            last = dataclasses.replace(last, metrics=metrics)
    if questions.out:
        append_event(run, "validations_given_up", steps=list(questions.out), waited_s=limit_s)
    _add_rows(run, rows)
    # Last: before it, another start would wait for the same validations again.
    checkpoint.amend(
        run,
        last.step,
        metrics=last.metrics,
        stopping=standing.record(rule),
        done=standing.done or last.done,
        stats={**last.stats, **_add_bad(run, bad)},
        pending=questions.out,
    )
    _prune(run, config)


def _answers(
    questions: Questions, process: Process, board: Any, *, limit_s: float
) -> Iterator[Outcome]:
    """Yield what is answered, until the process has had no place for too long."""
    had_place = time.monotonic()
    said = False
    while questions.out:
        yield from questions.take(timeout_s=1.0)
        waited_s = time.monotonic() - had_place
        if process.has_place:
            had_place, said = time.monotonic(), False
        elif waited_s > limit_s:
            steps = ", ".join(map(str, questions.out))
            board.say.remote(
                f"no place for the validation of steps {steps} for {waited_s:.0f} s; the run ends "
                "without it: submit the same command again where a node has room for it"
            )
            return
        elif not said:
            said = True
            board.say.remote(f"no node has room for the validation: waiting up to {limit_s:.0f} s")


def _rows(manifest: Manifest, metrics: dict[str, float]) -> list[dict[str, Any]]:
    at = {"step": manifest.step, "epoch": manifest.epoch, "samples": manifest.position}
    return [{**at, "name": name, "value": value} for name, value in metrics.items()]


def _add_rows(run: str, rows: list[dict[str, Any]]) -> None:
    location = storage.join(run, METRICS_FILE)
    table = pq.read_table(io.BytesIO(storage.read_bytes(location)))
    before: list[dict[str, Any]] = table.to_pylist()
    known = {(row["step"], row["name"]) for row in before}
    now = max((row["time"] for row in before), default=0.0)
    new = [{**row, "time": now} for row in rows if (row["step"], row["name"]) not in known]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([*before, *new], schema=table.schema), buffer)
    storage.write_atomic(location, buffer.getvalue())


def _add_bad(run: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Quarantine images that could not be read; return how many there are now, as stats."""
    quarantine, location = Quarantine(None), storage.join(run, QUARANTINE_FILE)
    if storage.exists(location):
        quarantine.add(pq.read_table(io.BytesIO(storage.read_bytes(location))).to_pylist())
    for row in quarantine.add(rows):
        append_event(run, "quarantined", **row)
    if rows:
        storage.write_atomic(location, quarantine.encode())
    return {"bad": len(quarantine)}


def _prune(run: str, config: Config) -> None:
    monitor, mode = checkpoint.monitored(config.train.early_stopping)
    best = checkpoint.best_of(checkpoint.list_manifests(run), monitor=monitor, mode=mode)
    checkpoint.prune(run, keep=config.train.checkpoint.keep, best=best)
