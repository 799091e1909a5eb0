"""Tables and pictures of a run: reads its folder, writes `report.md` and `report.html` there."""

import base64
import collections
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import plots, storage, templates
from orchestrator.config import UserError
from orchestrator.run import (
    EVALUATION_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    RESULT_FILE,
    read_events,
    read_result,
)
from orchestrator.tables import MAX_QUARANTINED, RunFiles, build_tables, describe_outcome

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One PNG file of the report."""

    file: str
    alt: str
    png: bytes

    @property
    def data_uri(self) -> str:
        """The picture as part of an HTML file."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def write_report(run: str) -> str:
    """Write the report of the run in this folder and return the URI of its HTML file.

    Raises:
        UserError: the folder holds nothing of a run, or one of its files cannot be read.
    """
    run = storage.absolute(run)
    files = _read(run)
    pictures, notes = draw_pictures(files.metrics, best_step=files.best.get("step"))
    name = run.rsplit("/", 1)[-1]
    context: dict[str, object] = {
        "name": name,
        "run": run,
        "outcome": describe_outcome(name, files.result, files.evaluation),
        "verdict": files.result.get("verdict") or "",
        "failed": files.result.get("stop_reason") == "failed",
        "tables": list(build_tables(files)),
        "pictures_after": "Result",
        "pictures": pictures,
        "notes": notes,
    }
    for picture in pictures:
        storage.write_atomic(storage.join(run, picture.file), picture.png)
    markdown, html = templates.render_markdown(context), templates.render_html(context)
    storage.write_atomic(storage.join(run, MARKDOWN_FILE), markdown.encode())
    location = storage.join(run, HTML_FILE)
    storage.write_atomic(location, html.encode())
    return location


def _read(run: str) -> RunFiles:
    known = (RESULT_FILE, EVENTS_FILE, METRICS_FILE, EVALUATION_FILE)
    if not any(storage.exists(storage.join(run, name)) for name in known):
        raise UserError(f"{run} holds none of {', '.join(known)}, so it is no run; check --run.")
    quarantined, num_quarantined = _read_parquet(run, QUARANTINE_FILE, _head) or ([], 0)
    result = _readable(run, RESULT_FILE, lambda: read_result(run)) or {}
    return RunFiles(
        result=result,
        evaluation=_readable(run, EVALUATION_FILE, lambda: _read_evaluation(run)),
        events=_readable(run, EVENTS_FILE, lambda: read_events(run)),
        metrics=_read_parquet(run, METRICS_FILE, lambda file: file.read()),
        quarantined=quarantined,
        num_quarantined=result.get("quarantined") or num_quarantined,
    )


def _read_evaluation(run: str) -> dict[str, Any]:
    location = storage.join(run, EVALUATION_FILE)
    content = storage.read_bytes(location) if storage.exists(location) else b"{}"
    evaluation: dict[str, Any] = json.loads(content)
    return evaluation


def _read_parquet(run: str, name: str, read: Callable[[pq.ParquetFile], Any]) -> Any:
    location = storage.join(run, name)
    if not storage.exists(location):
        return None

    def opened() -> Any:
        with storage.open_input(location) as file:
            return read(pq.ParquetFile(file))

    return _readable(run, name, opened)


def _readable(run: str, name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise UserError(
            f"{storage.join(run, name)} is damaged ({error}); delete it and write the report again."
        ) from error


def _head(file: pq.ParquetFile) -> tuple[list[dict[str, Any]], int]:
    batches = file.iter_batches(batch_size=MAX_QUARANTINED)
    first = next(batches, None)
    return (first.to_pylist() if first is not None else []), file.metadata.num_rows


def draw_pictures(
    metrics: pa.Table | None, *, best_step: int | None
) -> tuple[list[Picture], list[str]]:
    """Return the pictures of a metrics table, and what they do not show."""
    curves = [] if metrics is None else plots.read_curves(metrics)
    groups: dict[str, list[plots.Curve]] = collections.defaultdict(list)
    for curve in curves:
        groups[plots.group_of(curve.name)].append(curve)
    pictures = []
    for group in (plots.LOSS, plots.ACCURACY):
        if groups[group]:
            png = plots.plot_together(groups[group], label=group, best_step=best_step)
            pictures.append(_picture(group, groups[group], png))
    others = groups[plots.OTHER]
    if plots.few(others):
        pictures.append(_picture(plots.OTHER, others, plots.plot_others(others)))
    notes = [
        f"{c.name}: {c.num_not_finite:,} values are not finite and not drawn."
        for c in curves
        if c.num_not_finite
    ]
    if others and not plots.few(others):
        notes.append(f"{len(others):,} other metrics are in {METRICS_FILE}, too many to draw.")
    return pictures, notes


def _picture(group: str, curves: list[plots.Curve], png: bytes) -> Picture:
    names = ", ".join(c.name for c in curves)
    return Picture(file=f"report-{group}.png", alt=f"{names} over steps", png=png)
