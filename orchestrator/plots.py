"""Curves of a run's logged metrics, as PNG pictures. Pure: Arrow table in, bytes out."""

import dataclasses
import io
import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOSS, ACCURACY, OTHER = "loss", "accuracy", "other"
_MAX_OTHER = 6
_DPI = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the steps of a run, non-finite values left out."""

    name: str
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    num_not_finite: int


def read_curves(metrics: pa.Table) -> list[Curve]:
    """Return one curve for each metric name of a tidy metrics table, by name.

    A step that a restart did again counts with its newest value.
    """
    names = np.asarray(metrics["name"].to_pylist(), dtype=object)
    steps = metrics["step"].to_numpy()
    values = metrics["value"].to_numpy()
    order = np.lexsort((metrics["time"].to_numpy(), steps))
    curves = []
    for name in sorted(set(names)):
        mine = order[names[order] == name]
        newest = np.append(steps[mine][1:] != steps[mine][:-1], True)
        mine = mine[newest]
        finite = np.isfinite(values[mine])
        curves.append(
            Curve(
                name=str(name),
                steps=steps[mine][finite],
                values=values[mine][finite],
                num_not_finite=int((~finite).sum()),
            )
        )
    return curves


def group_of(name: str) -> str:
    """Return the picture a metric belongs to: LOSS, ACCURACY or OTHER."""
    words = name.lower().split("_")
    if "loss" in words:
        return LOSS
    return ACCURACY if {"acc", "accuracy"} & set(words) else OTHER


def plot_together(curves: list[Curve], *, label: str, best_step: int | None) -> bytes:
    """Return a picture with all curves on one pair of axes and the best checkpoint marked."""
    figure = Figure(figsize=(7.2, 3.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        _draw(axes, curve)
    if best_step is not None:
        axes.axvline(best_step, color="0.6", linewidth=1, linestyle=":", zorder=0)
        axes.annotate(
            "best",
            (best_step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            color="0.45",
            fontsize=8,
        )
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    legend = axes.legend(axes.lines[: len(curves)], [_label(c.name) for c in curves], frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name such as "$x" is a name, not a formula
    return _png(figure)


def plot_others(curves: list[Curve]) -> bytes:
    """Return a picture with one small pair of axes for each curve."""
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.1 * rows), dpi=_DPI, layout="constrained")
    for place, curve in enumerate(curves, start=1):
        axes = figure.add_subplot(rows, columns, place)
        _draw(axes, curve)
        axes.set_title(_label(curve.name), fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7)
    return _png(figure)


def few(curves: list[Curve]) -> bool:
    """Return whether these other metrics are few enough to be plotted."""
    return 0 < len(curves) <= _MAX_OTHER


def _draw(axes: Axes, curve: Curve) -> None:
    # A validation metric has few points: mark each.
    marker = "o" if len(curve.steps) <= 60 else ""
    axes.plot(curve.steps, curve.values, linewidth=1.4, marker=marker, markersize=3)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _label(name: str) -> str:
    # Matplotlib drops a legend entry that begins with an underscore.
    return name.lstrip("_")[:40] or "(no name)"


def _png(figure: Figure) -> bytes:
    # A Figure without pyplot draws with Agg: no display, no global state, safe in a thread.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
