"""What the units of a pack amount to: shards, labels, bad samples, progress. Pure but for time."""

import collections
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.base import Bad
from orchestrator.data.index import Index, ShardColumns
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.shard import UnitResult
from orchestrator.data.packing.units import Listed
from orchestrator.progress import format_duration

QUARANTINE_FILE = "quarantine.parquet"
QUARANTINE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("uri", "id", "reason", "first_bytes")),
        ("epoch", pa.int64()),
    ]
)
_SAY_EVERY_S = 3.0
# The first units take longer than others, since processes start with them.
_GUESS_FROM = 0.01
# Samples that are named when they are left out; QUARANTINE_FILE names all.
_SAY_BAD = 5
# Samples from which on the share that is left out says something.
_JUDGED_FROM = 1_000
# Bad samples turned from objects to columns at a time.
_BATCH = 4096


class BadTable:
    """Collects bad samples in columns."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._pending: list[Bad] = []
        self.count = 0

    def add(self, bad: Sequence[Bad]) -> None:
        """Take some."""
        self.count += len(bad)
        self._pending += bad
        if len(self._pending) >= _BATCH:
            self._flush()

    def table(self) -> pa.Table:
        """Return all, with the columns of `QUARANTINE_SCHEMA`, sorted by id."""
        self._flush()
        table = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *self._tables])
        return table.sort_by([("id", "ascending"), ("uri", "ascending")])

    def _flush(self) -> None:
        rows = [dataclasses.asdict(bad) for bad in self._pending]
        self._tables.append(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))
        self._pending.clear()


def by_reason(bad: pa.Table) -> list[tuple[str, int]]:
    """Return (reason, count) of a quarantine table, the most frequent first."""
    reasons = pc.list_element(pc.split_pattern(bad["reason"], ":", max_splits=1), 0)
    counts = pc.value_counts(reasons).to_pylist()
    return sorted(((c["values"], c["counts"]) for c in counts), key=lambda c: (-c[1], c[0]))


def write_quarantine(out: str, bad: pa.Table) -> None:
    """Write the table of bad samples; where there are none, remove an earlier one."""
    location = storage.join(out, QUARANTINE_FILE)
    if not bad.num_rows:
        storage.delete_file(location)
        return
    buffer = io.BytesIO()
    pq.write_table(bad, buffer)
    storage.write_atomic(location, buffer.getvalue())


def read_quarantine(out: str) -> pa.Table:
    """Return the table of bad samples of a packed folder; empty where there is none."""
    location = storage.join(out, QUARANTINE_FILE)
    if not storage.exists(location):
        return QUARANTINE_SCHEMA.empty_table()
    return pq.read_table(io.BytesIO(storage.read_bytes(location)), schema=QUARANTINE_SCHEMA)


def said_bad(bad: pa.Table) -> Iterator[str]:
    """Yield a line for each of the first few bad samples."""
    for row in bad.slice(0, _SAY_BAD).to_pylist():
        yield f"left out {row['uri']}: {row['reason']}"


class Tally:
    """What the units amount to so far."""

    def __init__(self) -> None:
        self.shards = ShardColumns()
        self.bad = BadTable()
        self.images_of_label = collections.Counter[int]()
        self.train_of_label = collections.Counter[int]()
        self.splits = collections.Counter[str]()
        self.listed = Listed(0, 0, 0)
        self.weight = 0
        """To be done in all, once it is known; see `Unit.weight`."""
        self.recoded = (0, 0)
        """Bytes of images before and after they were encoded again."""
        self._units = self._images = self._bytes = self._done = 0
        self._started = self._said = time.monotonic()

    def add(self, found: UnitResult | Listed) -> None:
        """Take what became of a unit, or of a part."""
        if isinstance(found, Listed):
            pairs = zip(dataclasses.astuple(self.listed), dataclasses.astuple(found), strict=True)
            self.listed = Listed(*(a + b for a, b in pairs))
            return
        for shard in found.shards:
            self.shards.add(shard)
            self.splits[shard.split] += shard.rows
        self.bad.add(found.bad)
        self.images_of_label.update(found.images_of_label)
        self.train_of_label.update(found.train_of_label)
        written = sum(shard.bytes for shard in found.shards)
        self.recoded = (self.recoded[0] + found.source_bytes, self.recoded[1] + written)
        self._units += 1
        self._images += found.images
        self._bytes += written
        self._done += found.weight

    def say_progress(self, say: Callable[[str], None]) -> None:
        """Say how far it is, every few seconds."""
        now = time.monotonic()
        if now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        say(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """Return progress, speed and, once the whole is known, the time that is left."""
        left = ""
        if self.weight and self._done > _GUESS_FROM * self.weight:
            rest = max(0, self.weight - self._done) / self._done * seconds
            share = min(1.0, self._done / self.weight)
            left = f", {share:.0%}, ETA {format_duration(rest)}"
        return (
            f"packed {self._images:,} images in {self._units:,} units, "
            f"{self._images / seconds:,.0f} images/s, {self._bytes / seconds / 1e6:,.1f} MB/s{left}"
        )

    def check(self, settings: PackSettings, classes: Sequence[str], *, folders: bool) -> None:
        """Refuse a data set that could not be trained on, before it gets an index.

        Raises:
            UserError: a class folder or a wanted split has no image, or too many are bad.
        """
        images = sum(self.splits.values())
        if not images:
            raise UserError(
                f"--source {settings.source} holds no image that can be packed{self._reasons()}; "
                "check it, or say what it is with --format and --image-column."
            )
        total = images + self.bad.count
        if total >= _JUDGED_FROM and self.bad.count > settings.max_bad_fraction * total:
            raise UserError(
                f"{self.bad.count:,} of {total:,} samples of --source {settings.source} would be "
                f"left out{self._reasons()}; mend them, say what they are with --label-kind and "
                "the like, or raise --max-bad-fraction."
            )
        for label, name in enumerate(classes if folders else ()):
            if not self.images_of_label[label]:
                raise UserError(
                    f"class folder {storage.join(settings.source, name)} holds no file that is an "
                    f"image (the first: {self._first_reason(name)}); remove the folder or restore "
                    "its images."
                )
        for split, fraction in settings.fractions().items():
            if fraction and not self.splits[split]:
                raise UserError(
                    f"split {split!r} would hold none of the {images} images, though its "
                    f"share is {fraction:g}; change --val-fraction or --test-fraction."
                )

    def _reasons(self) -> str:
        top = ", ".join(f"{count} {reason}" for reason, count in by_reason(self.bad.table())[:3])
        return f" ({top})" if top else ""

    def _first_reason(self, class_name: str) -> str:
        table = self.bad.table()
        mine = table.filter(pc.starts_with(table["id"], f"{class_name}/"))
        return str(mine["reason"][0]) if mine.num_rows else "gone since it was listed"


def summary(index: Index) -> str:
    """Return a line on what is packed."""
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in index.splits.items())
    label = "no labels" if index.label_kind == "none" else f"labels: {index.label_kind}"
    what = f"{len(index.classes):,} classes" if index.classes else label
    return f"{what}; images: {splits}; {index.quarantined:,} left out"
