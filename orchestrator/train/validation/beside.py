"""Driver side: validation beside training: its process, and what is still out at the run's end.

The process is the driver's: it outlives workers that are lost or resized, and goes on while they
are started again. Light: reading this module imports neither torch nor Lightning.
"""

import collections
import contextlib
import dataclasses
import io
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator import cluster, storage
from orchestrator.config import BesideConfig, Config, UserError
from orchestrator.run import METRICS_FILE, append_event
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.validation.stopping import Standing, check_monitor, standing_of

MAX_UNDER_WAY = 2
"""Validations asked for and not answered: one runs, one waits; what falls due then is skipped."""
# How often Ray gives a validation to a new process, where the one before was killed.
_MAX_RETRIES = 2
_STUCK = 10
# How long workers wait for its place to be taken; a cluster that grows takes longer.
_PLACE_S = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of the validation of one checkpoint."""

    step: int
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    bad: tuple[dict[str, Any], ...] = ()
    """Images that could not be decoded, as rows of the quarantine."""
    failed: str = ""
    """Why there are no metrics, or empty."""
    pid: int = 0
    """The process it ran in."""


class ValidationProcess:
    """The actor's state; it answers each step once and remembers the answer."""

    def __init__(self, run: str, config: Config, beside: BesideConfig, paths: list[str]) -> None:
        cluster.extend_imports(paths)
        self._run = run
        self._config = config
        self._beside = beside
        self._known: dict[int, Outcome] = {}

    def validate(self, step: int) -> Outcome:
        """Validate a committed checkpoint, unless it was done before."""
        if step not in self._known or self._known[step].failed:
            self._known[step] = self._validate(step)
        return self._known[step]

    def _validate(self, step: int) -> Outcome:
        try:
            manifest = checkpoint.read_manifest(self._run, step)
            if manifest.metrics:
                return Outcome(step=step, metrics=manifest.metrics, pid=os.getpid())
            # Only now: 8 s of CPU that a run which is starting must not pay.
            from orchestrator.train.validation import replica

            metrics, bad = replica.validate(self._run, self._config, self._beside, manifest)
            return Outcome(step=step, metrics=metrics, bad=tuple(bad), pid=os.getpid())
        except Exception as error:  # of the user's module or of storage: training goes on
            said = f"{type(error).__name__}: {cluster.sentence(error)}"
            return Outcome(step=step, failed=said, pid=os.getpid())


@contextlib.contextmanager
def process(run: str, config: Config) -> Iterator[Any]:
    """Start the process that validates, in a place of its own, and end it after the block.

    Yields:
        its handle; None where the config validates in line.
    """
    beside = config.train.validate.beside
    if beside is None:
        yield None
        return
    # As a placement group, since those are what elastic workers leave room for.
    place = placement_group([{"CPU": beside.cpus, "GPU": beside.gpus}])
    place.wait(_PLACE_S)
    actor = ray.remote(ValidationProcess).options(
        num_cpus=beside.cpus,
        num_gpus=beside.gpus,
        max_restarts=-1,
        max_task_retries=_MAX_RETRIES,
        scheduling_strategy=PlacementGroupSchedulingStrategy(place, 0),
    )
    handle = actor.remote(run, config, beside, cluster.import_paths())
    try:
        yield handle
    finally:
        ray.kill(handle)
        remove_placement_group(place)


class Questions:
    """Validations asked for and not answered, in the order of their steps.

    Args:
        handle: of the process.
        limit_s: a validation that takes longer than this, and ten times the longest so far, is
            taken to hang: its process is ended, and Ray gives it to a new one.
    """

    def __init__(self, handle: Any, *, limit_s: float = math.inf) -> None:
        self._handle = handle
        self._limit_s = limit_s
        self._asked: collections.deque[tuple[int, Any]] = collections.deque()
        self._since = 0.0
        self._longest_s: float | None = None

    def ask(self, step: int) -> None:
        """Ask for the validation of a committed checkpoint."""
        if not self._asked:
            self._since = time.monotonic()
        self._asked.append((step, self._handle.validate.remote(step)))

    def take(self, timeout_s: float = 0.0) -> list[Outcome]:
        """Return what is answered, in the order of steps: a later answer waits for earlier ones."""
        found = []
        while self._asked and ray.wait([self._asked[0][1]], timeout=timeout_s)[0]:
            step, answer = self._asked.popleft()
            took_s = time.monotonic() - self._since
            self._since += took_s
            try:
                found.append(ray.get(answer))
                self._longest_s = max(took_s, self._longest_s or 0.0)
            except RayError as error:  # killed more often than it is tried again
                found.append(Outcome(step=step, failed=cluster.sentence(error)))
        if self._asked:
            self._end_if_stuck()
        return found

    def wait(self) -> Iterator[Outcome]:
        """Yield all answers, in the order of steps."""
        while self._asked:
            yield from self.take(timeout_s=1.0)

    def _end_if_stuck(self) -> None:
        waited_s = time.monotonic() - self._since
        if self._longest_s is None or waited_s <= max(self._limit_s, _STUCK * self._longest_s):
            return  # nobody knows how long the first one takes
        ray.kill(self._handle, no_restart=False)
        self._since += waited_s


def settle(run: str, config: Config, handle: Any, board: Any) -> None:
    """Wait for the validations that are out at a run's end, and complete its checkpoints.

    Raises:
        UserError: the metric that early stopping watches was not logged.
    """
    found = checkpoint.list_manifests(run)
    if handle is None or not found or not found[-1].pending:
        return
    last, by_step = found[-1], {manifest.step: manifest for manifest in found}
    board.say.remote(f"training is done; waiting for {len(last.pending)} validations beside it")
    questions = Questions(handle, limit_s=config.train.hang_timeout_s)
    for step in last.pending:
        questions.ask(step)
    rule = config.train.early_stopping
    standing = standing_of(last.stopping, rule) or Standing()
    rows: list[dict[str, Any]] = []
    for outcome in questions.wait():
        if outcome.failed or outcome.step not in by_step:
            append_event(run, "validation_failed", step=outcome.step, error=outcome.failed)
            continue
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
    _add_rows(run, rows)
    # Last: before it, another start would wait for the same validations again.
    checkpoint.amend(
        run,
        last.step,
        metrics=last.metrics,
        stopping=standing.record(rule),
        done=standing.done or last.done,
        pending=(),
    )
    _prune(run, config)


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


def _prune(run: str, config: Config) -> None:
    monitor, mode = checkpoint.monitored(config.train.early_stopping)
    best = checkpoint.best_of(checkpoint.list_manifests(run), monitor=monitor, mode=mode)
    checkpoint.prune(run, keep=config.train.checkpoint.keep, best=best)


def check_room(config: Config, *, cpus: float, gpus: float) -> None:
    """Hold what the workers and the validation beside them reserve against a cluster.

    Raises:
        UserError: they never find a place together.
    """
    beside, scaling = config.train.validate.beside, config.scaling
    if beside is None:
        return
    for key, own, each, available, kind in (
        ("cpus", beside.cpus, scaling.cpus_per_worker, cpus, "CPUs"),
        ("gpus", beside.gpus, scaling.gpus_per_worker, gpus, "GPUs"),
    ):
        workers = scaling.min_workers * each
        if own > 0 and workers + own > available:
            raise UserError(
                f"train.validate.beside.{key}={own:g} does not fit beside {scaling.min_workers} "
                f"workers, which hold {workers:g} of this cluster's {available:g} {kind}; lower "
                "one of the two, add nodes, or set train.validate.beside to null."
            )
