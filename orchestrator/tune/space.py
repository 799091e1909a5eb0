"""The sweep's points: `tune.space` -> one dict of overrides for each trial. Pure, no Ray.

Each value is a pure function of (seed, trial, path), so the same config gives the same points, and
a new dimension or more trials leave the other values as they were.
"""

import difflib
import itertools
import math
from collections.abc import Mapping
from typing import Any

from orchestrator import configfile
from orchestrator.config import Config, TuneConfig, UserError
from orchestrator.data.stream import hash_key
from orchestrator.overrides import to_dict, with_overrides

KINDS = ("uniform", "loguniform", "randint", "choice", "grid")
_FIXED = ("name", "storage_path", "tune")

Point = dict[str, Any]


def points(config: Config) -> list[Point]:
    """Return the overrides of every trial: `num_samples` for each point of the grids' product.

    Equal points would train the same model twice, so each is returned once.

    Raises:
        UserError: the space, or a value it can yield, does not fit the config.
    """
    tune = check_tune(config)
    space = {path: _parse(path, spec) for path, spec in tune.space.items()}
    _check_paths(config, space)
    grids = {path: values for path, (kind, values) in space.items() if kind == "grid"}
    cells = [dict(zip(grids, cell, strict=True)) for cell in itertools.product(*grids.values())]
    found: list[Point] = []
    for trial in range(tune.num_samples * len(cells)):
        cell = cells[trial % len(cells)]
        point = {
            path: cell[path] if kind == "grid" else _draw(kind, values, config.seed, trial, path)
            for path, (kind, values) in space.items()
        }
        if point not in found:
            found.append(point)
    return found


def trial_config(config: Config, point: Mapping[str, Any], *, trial: int) -> Config:
    """Return the config of one trial: a run of its own below the sweep's folder.

    Raises:
        UserError: a value does not fit its field.
    """
    changed = with_overrides(config, {**point, "tune": None, "name": trial_name(config, trial)})
    try:
        return configfile.from_dict(to_dict(changed))
    except UserError as error:
        raise UserError(f"tune.space yields {dict(point)}: {error}") from error


def trial_name(config: Config, trial: int) -> str:
    """Return the run name of a trial."""
    return f"{config.name}/trials/{trial:04d}"


def check_tune(config: Config) -> TuneConfig:
    """Return the `tune` section if its numbers can work.

    Raises:
        UserError: a field's value cannot work.
    """
    tune = config.tune
    if tune is None or not tune.space:
        raise UserError(
            "tune.space is empty, so there is nothing to search; name what varies, e.g. "
            "tune: {space: {model.init_args.lr: {loguniform: [1.0e-4, 1.0e-1]}}}."
        )
    concurrent = 1 if tune.max_concurrent_trials is None else tune.max_concurrent_trials
    for key, value, least in (
        ("num_samples", tune.num_samples, 1),
        ("grace_epochs", tune.grace_epochs, 1),
        ("reduction_factor", tune.reduction_factor, 2),
        ("max_concurrent_trials", concurrent, 1),
    ):
        if value < least:
            raise UserError(f"tune.{key}={value} must be at least {least}.")
    return tune


def _parse(path: str, spec: Any) -> tuple[str, list[Any]]:
    key = f"tune.space[{path!r}]"
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise UserError(
            f"{key} must be one of {', '.join(KINDS)} with its values, such as "
            f"{{loguniform: [0.001, 0.1]}}, but it is {spec!r}."
        )
    kind, values = next(iter(spec.items()))
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(KINDS)}."
        raise UserError(f"{key} has no kind {kind!r}: {hint}")
    if not isinstance(values, list) or not values:
        raise UserError(f"{key}.{kind} must be a list that is not empty, but it is {values!r}.")
    if kind not in ("choice", "grid"):
        _check_bounds(f"{key}.{kind}", kind, values)
    return kind, values


def _check_bounds(key: str, kind: str, values: list[Any]) -> None:
    number = int if kind == "randint" else (int, float)
    fits = [isinstance(v, number) and not isinstance(v, bool) for v in values]
    if len(values) != 2 or not all(fits) or not all(map(math.isfinite, values)):
        what = "integers" if kind == "randint" else "numbers"
        raise UserError(f"{key} must be two {what}, [low, high], but it is {values!r}.")
    low, high = values
    if low >= high:
        raise UserError(f"{key} must have low < high, but it is {values!r}; turn them round.")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{key} must lie above 0, but low is {low}; use uniform, or raise it.")


def _check_paths(config: Config, space: Mapping[str, tuple[str, list[Any]]]) -> None:
    for path, (_, values) in space.items():
        if path.split(".")[0] in _FIXED:
            raise UserError(f"tune.space cannot vary {path!r}: it belongs to the sweep; remove it.")
        with_overrides(config, {path: values[0]})
        inner = [other for other in space if other.startswith(f"{path}.")]
        if inner:
            raise UserError(f"tune.space has {path!r} and {inner[0]!r} inside it; keep one.")


def _draw(kind: str, values: list[Any], seed: int, trial: int, path: str) -> Any:
    unit = (hash_key("tune", seed, trial, path) >> 11) * 2.0**-53  # in [0, 1)
    if kind == "choice":
        return values[int(unit * len(values))]
    low, high = values
    if kind == "randint":  # both ends may be drawn
        return low + int(unit * (high - low + 1))
    if kind == "uniform":
        return low + unit * (high - low)
    drawn = math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
    return min(max(drawn, low), high)
