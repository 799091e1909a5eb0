"""Driver side: an ImageFolder tree -> Parquet shards and an index, as one Ray Data job.

Listers (read tasks) cut the tree into units; each unit is one packing task; the driver sees only
what became of each unit, and writes the index last. Mistakes of the user's that a task finds travel
back as a value, so that they end in one sentence and not in Ray's stack trace.
"""

import collections
import dataclasses
import functools
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from orchestrator import cluster, storage
from orchestrator.config import UserError
from orchestrator.data import imagefolder
from orchestrator.data.imagefolder import File, Unit
from orchestrator.data.index import INDEX_FILE, Index, Shard, read_index, write_index
from orchestrator.data.shard import Bad, PackSettings, UnitResult, pack_unit

QUARANTINE_FILE = "quarantine.parquet"
# A packing task and its share of the listers add up to one CPU.
_PACK_CPUS = 0.9
_LIST_CPUS = 0.05
_SAY_EVERY_S = 3.0
# Files that are named when they are left out; QUARANTINE_FILE names all.
_SAY_BAD = 5

_UNIT_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("ids", pa.list_(pa.binary())),
        ("sizes", pa.list_(pa.int64())),
        ("labels", pa.list_(pa.int32())),
        ("error", pa.string()),
    ]
)
_RESULT_SCHEMA = pa.schema([("result", pa.string()), ("error", pa.string())])
_QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("uri", "id", "reason")])


def pack(
    source: str,
    out: str,
    *,
    chunk_rows: int = 64,
    unit_images: int = 4096,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    say: Callable[[str], None],
    verbose: bool = False,
) -> Index:
    """Pack `source` into `out` and return the index; a pack that was killed is finished.

    Ray is connected once there is work: not for a mistake, and not where `out` is already packed
    from this source with these settings.

    Raises:
        UserError: the source, the target or a setting does not allow it.
    """
    settings = PackSettings(
        source=storage.absolute(source),
        chunk_rows=chunk_rows,
        unit_images=unit_images,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
    settings.check()
    out = storage.absolute(out)
    finished = _find_finished(out, settings)
    if finished is not None:
        say(f"{out} is packed already ({_summary(finished)}); nothing to do")
        return finished
    classes = imagefolder.find_classes(settings.source, say)
    storage.check_writable(out)
    cluster.connect(verbose=verbose)
    packed = _Packed()
    for result in _run(settings, out, classes):
        packed.add(result)
        packed.say_progress(say)
    packed.check(settings, classes)
    index = _write(out, classes, packed, settings)
    say(f"packed {out}: {_summary(index)}")
    for bad in packed.bad[:_SAY_BAD]:
        say(f"left out {bad.uri}: {bad.reason}")
    return index


def _find_finished(out: str, settings: PackSettings) -> Index | None:
    if f"{out}/".startswith(f"{settings.source}/"):
        raise UserError(
            f"--out {out} lies in --source {settings.source}, where shards would be taken for "
            "images; choose a folder outside."
        )
    if not storage.exists(storage.join(out, INDEX_FILE)):
        return None
    index = read_index(out)
    for key, value in dataclasses.asdict(settings).items():
        if index.settings.get(key) != value:
            raise UserError(
                f"--out {out} was packed with {key} {index.settings.get(key)!r}, not {value!r}; "
                "choose another --out, or delete it first."
            )
    return index


class _Packed:
    """What the units amount to so far."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.bad: list[Bad] = []
        self.images_of_label = collections.Counter[int]()
        self._units = self._images = self._bytes = 0
        self._started = self._said = time.monotonic()

    def add(self, result: UnitResult) -> None:
        self.shards += result.shards
        self.bad += result.bad
        self.images_of_label.update(result.images_of_label)
        self._units += 1
        self._images += result.images
        self._bytes += sum(shard.bytes for shard in result.shards)

    def say_progress(self, say: Callable[[str], None]) -> None:
        now = time.monotonic()
        if now - self._said < _SAY_EVERY_S:
            return
        self._said, seconds = now, now - self._started
        say(
            f"packed {self._images:,} images in {self._units:,} units, "
            f"{self._images / seconds:,.0f} images/s, {self._bytes / seconds / 1e6:,.1f} MB/s"
        )

    def check(self, settings: PackSettings, classes: Sequence[str]) -> None:
        """Refuse a data set that could not be trained on, before it gets an index."""
        for label, name in enumerate(classes):
            if not self.images_of_label[label]:
                reasons = (bad.reason for bad in self.bad if bad.id.startswith(f"{name}/"))
                raise UserError(
                    f"class folder {storage.join(settings.source, name)} holds no file that is an "
                    f"image (the first: {next(reasons, 'gone since it was listed')}); remove the "
                    "folder or restore its images."
                )
        splits = {shard.split for shard in self.shards}
        for split, fraction in settings.fractions().items():
            if fraction and split not in splits:
                raise UserError(
                    f"split {split!r} would hold none of the {self._images} images, though its "
                    f"share is {fraction:g}; change --val-fraction or --test-fraction."
                )


def _run(settings: PackSettings, out: str, classes: Sequence[str]) -> Iterator[UnitResult]:
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    num_listers = imagefolder.num_listers(classes)
    dataset = ray.data.read_datasource(
        _Listing(settings, classes),
        override_num_blocks=num_listers,
        compute=TaskPoolStrategy(size=min(num_listers, 2 * max(1, num_cpus))),
        num_cpus=_LIST_CPUS,
    ).map_batches(
        functools.partial(_pack_block, out=out, settings=settings),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_PACK_CPUS,
    )
    _tune(dataset.context)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            if row["error"]:
                raise UserError(row["error"])
            yield UnitResult.from_json(row["result"])


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
    """Read tasks that list classes and yield a row for each unit."""

    def __init__(self, settings: PackSettings, classes: Sequence[str]) -> None:
        self._settings = settings
        self._classes = classes

    def estimate_inmemory_data_size(self) -> None:
        """Return nothing: Ray Data shall not size tasks itself."""

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return one read task for each lister, whatever `parallelism` Ray Data would like."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        classes = ray.put(self._classes)
        return [
            ReadTask(functools.partial(_list_blocks, self._settings, classes, lister), unknown)
            for lister in range(imagefolder.num_listers(self._classes))
        ]


def _list_blocks(
    settings: PackSettings, classes: "ray.ObjectRef[Sequence[str]]", lister: int
) -> Iterator[pa.Table]:
    units = imagefolder.list_units(
        settings.source, ray.get(classes), lister=lister, max_images=settings.unit_images
    )
    try:
        for unit in units:
            row = {
                "name": unit.name,
                "ids": [imagefolder.encode_id(file.id) for file in unit.files],
                "sizes": [file.size for file in unit.files],
                "labels": [file.label for file in unit.files],
            }
            yield pa.Table.from_pylist([row], schema=_UNIT_SCHEMA)
    except UserError as error:
        yield pa.Table.from_pylist([{"error": str(error)}], schema=_UNIT_SCHEMA)


def _pack_block(block: pa.Table, *, out: str, settings: PackSettings) -> pa.Table:
    results: list[str | None] = []
    errors: list[str | None] = []
    for row in block.to_pylist():
        result, error = None, row["error"]
        if not error:
            try:
                result = pack_unit(_unit(row), out, settings).to_json()
            except UserError as mistake:
                error = str(mistake)
        results.append(result)
        errors.append(error)
    return pa.table({"result": results, "error": errors}, schema=_RESULT_SCHEMA)


def _unit(row: dict[str, Any]) -> Unit:
    columns = zip(row["ids"], row["sizes"], row["labels"], strict=True)
    return Unit(row["name"], tuple(File(os.fsdecode(i), size, label) for i, size, label in columns))


def _write(out: str, classes: Sequence[str], packed: _Packed, settings: PackSettings) -> Index:
    quarantine = storage.join(out, QUARANTINE_FILE)
    if packed.bad:
        rows = [dataclasses.asdict(bad) for bad in sorted(packed.bad, key=lambda bad: bad.id)]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_QUARANTINE_SCHEMA), buffer)
        storage.write_atomic(quarantine, buffer.getvalue())
    else:
        storage.delete_file(quarantine)  # of a run that was killed, before the files were mended
    return write_index(
        out,
        classes=classes,
        shards=packed.shards,
        settings=dataclasses.asdict(settings),
        quarantined=len(packed.bad),
    )


def _summary(index: Index) -> str:
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in index.splits.items())
    return f"{len(index.classes):,} classes; images: {splits}; {index.quarantined:,} left out"
