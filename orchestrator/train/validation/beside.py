"""Driver side: validation beside training: its process, and what it is asked.

The process is the driver's: it outlives workers that are lost or resized, and goes on while they
are started again. Light: reading this module imports neither torch nor Lightning.
"""

import collections
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator import cluster
from orchestrator.config import BesideConfig, Config
from orchestrator.run import read_events
from orchestrator.train import memory_limits
from orchestrator.train.errors import OutOfMemory, is_out_of_memory
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation.watchdog import Watchdog

MAX_UNDER_WAY = 2
"""Validations asked for and not answered: one runs, one waits; what falls due then is skipped."""
# How often Ray gives a validation to a new process, where the one before was killed.
_MAX_RETRIES = 2
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

    def __init__(
        self, run: str, config: Config, beside: BesideConfig, paths: list[str], board: Any
    ) -> None:
        cluster.extend_imports(paths)
        self._run = run
        self._config = config
        self._beside = beside
        self._board = board
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
            with self._watched() as watchdog:
                metrics, bad = self._fitting(manifest, watchdog.note)
            return Outcome(step=step, metrics=metrics, bad=tuple(bad), pid=os.getpid())
        except Exception as error:  # of the user's module or of storage: training goes on
            said = f"{type(error).__name__}: {cluster.sentence(error)}"
            return Outcome(step=step, failed=said, pid=os.getpid())

    def _fitting(
        self, manifest: checkpoint.Manifest, note: Callable[[], None]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Validate with as many samples at once as fit; what did not is written down."""
        # Only now: 8 s of CPU that a run which is starting must not pay.
        from orchestrator.train.validation import replica

        while True:
            known = memory_limits.limits_of(read_events(self._run), self._config)
            config = memory_limits.limited(self._config, known)
            size = config.data.eval_batch
            try:
                return replica.validate(self._run, config, self._beside, manifest, note=note)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                said = cluster.sentence(error)
            # After the block, whose traceback holds the model and the batch that were too much.
            replica.free_memory()
            lacking = OutOfMemory(memory_limits.EVAL_BATCH, size, manifest.step, said)
            memory_limits.remember(self._run, self._config, self._board, lacking, worker=-1)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Watchdog]:
        """End this process where the block gets nowhere: Ray gives the step to a new one."""
        limit_s = self._config.train.hang_timeout_s
        watchdog = Watchdog(limit_s, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with watchdog.watching():
            yield watchdog


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """The process that validates."""

    handle: Any
    """Of its actor."""
    place: PlacementGroup

    @property
    def has_place(self) -> bool:
        """Whether a node has room for it now."""
        return bool(self.place.wait(0.1))


@contextlib.contextmanager
def process(run: str, config: Config, board: Any) -> Iterator[Process | None]:
    """Start the process that validates, in a place of its own, and end it after the block.

    Yields:
        None where the config validates in line.
    """
    beside = config.train.validate.beside
    if beside is None:
        yield None
        return
    # As a placement group, since those are what elastic workers leave room for.
    place = placement_group([{"CPU": beside.cpus, "GPU": beside.gpus}])
    if not place.wait(_PLACE_S):
        board.say.remote("the validation beside training has no place yet; training starts")
    actor = ray.remote(ValidationProcess).options(
        num_cpus=beside.cpus,
        num_gpus=beside.gpus,
        max_restarts=-1,
        max_task_retries=_MAX_RETRIES,
        scheduling_strategy=PlacementGroupSchedulingStrategy(place, 0),
    )
    handle = actor.remote(run, config, beside, cluster.import_paths(), board)
    try:
        yield Process(handle, place)
    finally:
        ray.kill(handle)
        remove_placement_group(place)


class Questions:
    """Validations asked for and not answered, in the order of their steps.

    Args:
        handle: of the process.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._asked: collections.deque[tuple[int, Any]] = collections.deque()

    def ask(self, step: int) -> None:
        """Ask for the validation of a committed checkpoint."""
        self._asked.append((step, self._handle.validate.remote(step)))

    def take(self, timeout_s: float = 0.0) -> list[Outcome]:
        """Return what is answered, in the order of steps: a later answer waits for earlier ones."""
        found = []
        while self._asked and ray.wait([self._asked[0][1]], timeout=timeout_s)[0]:
            step, answer = self._asked.popleft()
            try:
                found.append(ray.get(answer))
            except RayError as error:  # killed more often than it is tried again
                found.append(Outcome(step=step, failed=cluster.sentence(error)))
        return found

    @property
    def out(self) -> tuple[int, ...]:
        """The steps that are asked for and not answered."""
        return tuple(step for step, _ in self._asked)
