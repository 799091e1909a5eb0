"""What a run writes down: the table of metrics grows, and each row is converted once."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.run import METRICS_FILE
from orchestrator.train.saving import journal
from orchestrator.train.saving.journal import METRICS_SCHEMA, Metrics


def add(metrics: Metrics, step: int) -> None:
    metrics.add({"train_loss": 1 / step, "lr": 1}, step=step, epoch=0, samples=step * 8)


def rows(metrics: Metrics) -> list[dict[str, Any]]:
    table = pq.read_table(io.BytesIO(metrics.encode()))
    assert table.schema.equals(METRICS_SCHEMA)
    found: list[dict[str, Any]] = table.drop_columns("time").to_pylist()
    return found


def expected(steps: range) -> list[dict[str, Any]]:
    return [
        {"step": step, "epoch": 0, "samples": step * 8, "name": name, "value": value}
        for step in steps
        for name, value in (("train_loss", 1 / step), ("lr", 1.0))
    ]


def test_a_copy_holds_what_was_noted_and_nothing_later() -> None:
    metrics = Metrics(None)
    assert rows(metrics) == []
    add(metrics, 1)
    copied = metrics.frozen()
    add(metrics, 2)
    assert rows(copied) == expected(range(1, 2))
    assert rows(metrics) == expected(range(1, 3))


def test_a_resumed_run_goes_on_with_its_rows(tmp_path: Path) -> None:
    metrics = Metrics(None)
    add(metrics, 1)
    (tmp_path / METRICS_FILE).write_bytes(metrics.encode())
    resumed = Metrics(tmp_path)
    add(resumed, 2)
    assert rows(resumed) == expected(range(1, 3))


def test_each_row_is_converted_once_over_many_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    make = pa.table

    def table(columns: list[list[Any]], **options: Any) -> pa.Table:
        converted.append(len(columns[0]))
        return make(columns, **options)

    monkeypatch.setattr(journal.pa, "table", table)
    metrics, saves = Metrics(None), 2 * journal._MAX_CHUNKS
    for step in range(1, saves + 1):
        add(metrics, step)
        copied = metrics.frozen()
    assert rows(copied) == expected(range(1, saves + 1))
    assert converted == [2] * saves
    assert copied._table.column(0).num_chunks <= journal._MAX_CHUNKS
