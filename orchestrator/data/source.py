"""Stream -> Ray Dataset -> one iterator for each worker. The only place where Ray Data is tuned.

A dataset covers a *segment* of the stream: some thousand read tasks, one Ray Data execution. Its
blocks have one row each, a worker's part of a round, and Ray Data deals them to the workers in
strict round robin. Three settings make that so (tried on Ray 2.60.0): `preserve_order`, a target
block size of one byte, under which blocks are neither merged nor split, and `equal=True`.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterable
from typing import Any

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
from orchestrator.data.feeds import Feed
from orchestrator.data.fetch import Work
from orchestrator.data.render import Reader

# Pixels that may lie ready in the object store, as a multiple of what the read tasks that run at
# once produce: enough to ride out a slow task, small enough never to spill.
_BUFFERED_TASKS = 2
_MIN_BUFFER_BYTES = 64 << 20
# What else lies there: blocks that workers hold and fetch, and other runs.
_SHARE_OF_STORE = 0.4
# Read tasks of one Ray Data execution, for each slot and in all. A task costs about 1 ms when the
# execution starts, and the first batch waits for all of them; starting one costs 1 to 2 s of CPU,
# against 40 s of reading with 16 tasks a slot.
_SEGMENT_TASKS_PER_SLOT = 16
_MIN_SEGMENT_TASKS, _MAX_SEGMENT_TASKS = 256, 4096
# The next execution starts when the tasks left are as many as this for each slot: some 5 s.
_LEAD_TASKS_PER_SLOT = 4
# Blocks that Ray Data fetches ahead of the worker: one, since it holds several micro-batches.
_PREFETCH_BLOCKS = 1
# Of one run: training and validation; of a sweep's trials that a process served lately.
_KEPT_READERS = 8
_MAX_TASK_RETRIES = 10
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

    def __init__(self, reader: "ray.ObjectRef[Reader]", works: list[Work]) -> None:
        self._reader = reader
        self._works = works

    def estimate_inmemory_data_size(self) -> None:
        """Return nothing: Ray Data shall not size tasks itself."""

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return one read task for each planned task, whatever `parallelism` is asked for."""
        return [_read_task(self._reader, work) for work in self._works]


def _read_task(reader: "ray.ObjectRef[Reader]", work: Work) -> ReadTask:
    def read() -> Iterable[pa.Table]:
        return _reader(reader).blocks(work)

    unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
    return ReadTask(read, unknown)


@functools.lru_cache(maxsize=_KEPT_READERS)
def _reader(reference: "ray.ObjectRef[Reader]") -> Reader:
    # A read process serves many tasks, of training and validation in turn.
    reader: Reader = ray.get(reference)
    return reader


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps that one Ray Data execution reads."""

    step: int
    stop_step: int
    open_next_at: int
    """The step before which the next segment should be opened, so that no worker waits for it."""


def plan_segment(feed: Feed, placement: Placement, step: int) -> Segment:
    """Return the segment that starts at `step`."""
    tasks = max(_MIN_SEGMENT_TASKS, _SEGMENT_TASKS_PER_SLOT * placement.slots)
    task_rows = max(plan.TASK_ROWS, feed.source.order.usual_window)
    steps = max(1, min(tasks, _MAX_SEGMENT_TASKS) * task_rows // feed.batching.step_samples)
    lead = 1 + _LEAD_TASKS_PER_SLOT * placement.slots * task_rows // feed.batching.step_samples
    stop = min(feed.batching.num_steps, step + steps)
    return Segment(step, stop, max(step, stop - lead))


def split_segment(feed: Feed, placement: Placement, segment: Segment) -> list[DataIterator]:
    """Start reading a segment and return one iterator of blocks for each worker.

    Iterator r yields, in order, the blocks with the micro-batches r, r + n, r + 2n, ... of n
    workers.
    """
    works = list(feed.works(step=segment.step, stop_step=segment.stop_step))
    dataset = ray.data.read_datasource(
        StreamSource(ray.put(feed.reader), works),
        override_num_blocks=len(works),
        compute=TaskPoolStrategy(size=placement.slots),
        num_cpus=placement.cpus,
        # Ray Data's own is for ever: what kills a reader each time must end the run, not hang it.
        ray_remote_args={"max_retries": _MAX_TASK_RETRIES},
        **_nodes_without_gpus(),
    )
    _tune(dataset.context, feed, placement, works)
    iterators: list[DataIterator] = dataset.streaming_split(feed.batching.num_workers, equal=True)
    return iterators


def _nodes_without_gpus() -> dict[str, Any]:
    """Return options that try nodes without GPUs first, where there are nodes of both kinds.

    What the workers leave of the others' CPUs is used when those are taken, or gone.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU")]
    if not with_gpus or len(with_gpus) == len(nodes):
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"!in({','.join(with_gpus)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def blocks_of(iterator: DataIterator) -> Generator[pa.Table, None, None]:
    """Yield a worker's blocks; the execution starts when all workers ask for their first."""
    yield from iterator.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=_PREFETCH_BLOCKS
    )


def _tune(context: DataContext, feed: Feed, placement: Placement, works: list[Work]) -> None:
    side = feed.reader.render.data.image_size
    task_bytes = max(work.task.stop - work.task.start for work in works) * side * side * 3
    store = ray.cluster_resources().get("object_store_memory", 0)
    buffer = min(_SHARE_OF_STORE * store, _BUFFERED_TASKS * placement.slots * task_bytes)
    buffer = max(_MIN_BUFFER_BYTES, buffer)
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=buffer)
    # Reading a process's memory map once a second takes milliseconds from decoding.
    context.memory_usage_poll_interval_s = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
