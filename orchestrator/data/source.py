"""Stream -> Ray Dataset -> one iterator for each worker. The only place where Ray Data is tuned.

A dataset covers a *segment* of the stream: some thousand read tasks, one Ray Data execution. Its
blocks have one row each, a piece of one micro-batch, and Ray Data deals them to the workers in
strict round robin. Three settings make that so (tried on Ray 2.60.0): `preserve_order`, a target
block size of one byte, under which blocks are neither merged nor split, and `equal=True`.
"""

import dataclasses
from collections.abc import Iterable

import pyarrow as pa
import ray
import ray.data
from ray.data import (
    DataContext,
    DataIterator,
    Datasource,
    ExecutionResources,
    ReadTask,
    TaskPoolStrategy,
)
from ray.data.block import BlockMetadata

from orchestrator.data import plan
from orchestrator.data.render import Feed

# Pixels that may lie ready in the object store, as a multiple of what the read tasks that run at
# once produce: enough to ride out a slow task, small enough never to spill.
_BUFFERED_TASKS = 2
_MIN_BUFFER_BYTES = 64 << 20
# A reader of training data and one of validation data add up to one CPU; see `Placement.beside`.
_READER_CPUS = 0.9


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where read tasks run."""

    slots: int
    """Read tasks that run at once."""
    cpus: float
    """CPUs that each reserves: 0 where the workers hold all CPUs and readers share them."""
    reason: str

    @classmethod
    def choose(
        cls,
        *,
        requested: int | None,
        cluster_cpus: float,
        worker_cpus: float,
        may_grow: bool = False,
        share: int = 1,
    ) -> "Placement":
        """Give readers the CPUs that workers leave; where they leave none, share the workers'.

        Args:
            requested: the user's number of slots, or None.
            cluster_cpus: CPUs of the cluster.
            worker_cpus: CPUs that workers reserve on it.
            may_grow: nodes may be added for tasks that wait for a CPU, so slots that were asked
                for wait; slots chosen here never do, as the cluster may have grown to its end.
            share: runs that divide the cluster between them.
        """
        spare = int((cluster_cpus - worker_cpus) / share)
        if requested is not None:
            reserve = requested <= spare or may_grow
            return cls(requested, _READER_CPUS * reserve, f"data.decode_slots={requested}")
        if spare >= 1:
            return cls(spare, _READER_CPUS, f"of {cluster_cpus:g} CPUs workers leave {spare}")
        slots = max(1, int(cluster_cpus / share))
        return cls(slots, 0, f"workers hold all {cluster_cpus:g} CPUs, so reading shares them")

    def beside(self) -> "Placement":
        """Return the placement of a second dataset, which waits while the first is read.

        Readers that wait for their consumer keep their CPU; so that the two never starve each
        other, both together take no more than one CPU a slot.
        """
        return dataclasses.replace(self, cpus=(1 - _READER_CPUS) * bool(self.cpus))


class StreamSource(Datasource):  # type: ignore[misc]
    """A segment of the stream as a Ray Data source."""

    def __init__(self, feed: "ray.ObjectRef[Feed]", tasks: list[plan.Task]) -> None:
        self._feed = feed
        self._tasks = tasks

    def estimate_inmemory_data_size(self) -> None:
        """Return nothing: Ray Data shall not size tasks itself."""

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return one read task for each planned task, whatever `parallelism` is asked for."""
        return [self._read_task(task) for task in self._tasks]

    def _read_task(self, task: plan.Task) -> ReadTask:
        feed = self._feed

        def read() -> Iterable[pa.Table]:
            return _feed(feed).blocks(task)

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(read, unknown)


_feeds: dict[str, Feed] = {}


def _feed(reference: "ray.ObjectRef[Feed]") -> Feed:
    # A read process serves many tasks of one feed; its orders and tables are built once.
    key = reference.hex()
    if key not in _feeds:
        _feeds.clear()
        _feeds[key] = ray.get(reference)
    return _feeds[key]


def split_segment(
    feed: Feed, placement: Placement, *, step: int, stop_step: int
) -> list[DataIterator]:
    """Start reading steps [step, stop_step) and return one iterator of blocks for each worker.

    Iterator r yields, in order, the micro-batches r, r + n, r + 2n, ... of n workers.
    """
    tasks = plan.tasks(feed.stream, feed.batching, step=step, stop_step=stop_step)
    source = StreamSource(ray.put(feed), tasks)
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=len(tasks),
        compute=TaskPoolStrategy(size=placement.slots),
        num_cpus=placement.cpus,
    )
    _tune(dataset.context, feed, placement, tasks)
    iterators: list[DataIterator] = dataset.streaming_split(feed.batching.num_workers, equal=True)
    return iterators


def _tune(context: DataContext, feed: Feed, placement: Placement, tasks: list[plan.Task]) -> None:
    side = feed.render.data.image_size
    task_bytes = max(task.stop - task.start for task in tasks) * side * side * 3
    buffer = max(_MIN_BUFFER_BYTES, _BUFFERED_TASKS * placement.slots * task_bytes)
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=buffer)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
