"""Driver side: listing and packing as one Ray Data job.

Listers (read tasks) cut the source into units; each unit is one task; the driver sees only what
became of each unit. Mistakes of the user's that a task finds travel back as a value, so that they
end in one sentence and not in Ray's stack trace.
"""

import dataclasses
import functools
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from orchestrator.config import UserError
from orchestrator.data.formats.base import Format, Survey, Unit
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.shard import UnitResult, pack_unit
from orchestrator.data.packing.units import Listed, Lister

# A packing task and its share of the listers add up to one CPU.
_PACK_CPUS = 0.9
_LIST_CPUS = 0.05
_SCHEMA = pa.schema([("unit", pa.binary()), ("found", pa.binary()), ("error", pa.string())])
_Work = Callable[[Format, Unit], Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is listed, and where what was packed of it lies."""

    source: Format
    out: str
    generation: int
    """0: the first pack; others add what is new."""
    settings: PackSettings

    def survey(self) -> Survey:
        """Look at every item that is not packed yet.

        Raises:
            UserError: something in the source may not be packed.
        """
        total = Survey()
        for found in self._run(_survey):
            if isinstance(found, Survey):
                total.merge(found)
        return total

    def pack(self) -> Iterator[UnitResult | Listed]:
        """Pack every unit and yield what became of it, and of those packed before.

        Raises:
            UserError: something in the source may not be packed, or cannot be read or written.
        """
        work = functools.partial(_pack, out=self.out, settings=self.settings)
        yield from self._run(work)

    def start_weighing(self) -> "list[ray.ObjectRef[int]]":
        """Start adding up the weight of all items, for the time that is left; see `Unit.weight`."""
        weigh = ray.remote(num_cpus=_LIST_CPUS, max_retries=0)(_weigh)
        source = ray.put(self.source)
        return [weigh.remote(source, part) for part in range(self.source.parts)]

    def _run(self, work: _Work) -> Iterator[Any]:
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        parts = self.source.parts
        source = ray.put(self.source)
        dataset = ray.data.read_datasource(
            _Listing(self, source),
            override_num_blocks=parts,
            compute=TaskPoolStrategy(size=min(parts, 2 * max(1, num_cpus))),
            num_cpus=_LIST_CPUS,
        ).map_batches(
            functools.partial(_work_on, source=source, work=work),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=_PACK_CPUS,
        )
        _tune(dataset.context)
        for batch in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for row in batch.to_pylist():
                if row["error"]:
                    raise UserError(row["error"])
                yield pickle.loads(row["found"])


def _tune(context: DataContext) -> None:
    # A unit is a block and a task: larger targets would merge units until a lister ends.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Its console handler ignores the level that `ray.init` was given.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.getLogger("ray").getEffectiveLevel())


class _Listing(Datasource):  # type: ignore[misc]
    """Read tasks that list a part of the source and yield a row for each unit."""

    def __init__(self, job: Job, source: "ray.ObjectRef[Format]") -> None:
        self._parts = job.source.parts
        self._source = source
        self._options = (job.out, job.generation, job.settings.unit_images)

    def estimate_inmemory_data_size(self) -> None:
        """Return nothing: Ray Data shall not size tasks itself."""

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return one read task for each part, whatever `parallelism` Ray Data would like."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(_list_blocks, self._source, part, *self._options), unknown)
            for part in range(self._parts)
        ]


def _list_blocks(
    source: "ray.ObjectRef[Format]", part: int, out: str, generation: int, max_images: int
) -> Iterator[pa.Table]:
    try:
        for found in Lister(ray.get(source), part, out, generation, max_images).run():
            is_unit = isinstance(found, Unit)
            yield _row(**{"unit" if is_unit else "found": pickle.dumps(found)})
    except UserError as error:
        yield _row(error=str(error))


def _work_on(block: pa.Table, *, source: "ray.ObjectRef[Format]", work: _Work) -> pa.Table:
    rows = []
    for row in block.to_pylist():
        if row["unit"]:
            try:
                found = work(ray.get(source), pickle.loads(row["unit"]))
                row = {"found": pickle.dumps(found)}
            except UserError as mistake:
                row = {"error": str(mistake)}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _row(**values: bytes | str) -> pa.Table:
    return pa.Table.from_pylist([values], schema=_SCHEMA)


def _pack(source: Format, unit: Unit, *, out: str, settings: PackSettings) -> UnitResult:
    result = pack_unit(unit, out, settings, source)
    return dataclasses.replace(result, known="")  # the marker has it


def _survey(source: Format, unit: Unit) -> Survey:
    found = source.survey(unit.items)
    found.weight = unit.weight
    return found


def _weigh(source: Format, part: int) -> int:
    size = count = 0
    for item in source.items(part):
        size, count = size + item.size, count + 1
    return size or count
