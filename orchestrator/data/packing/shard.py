"""The work of one packing task: a unit -> shards of each split, then its marker.

Needs no Ray. A unit's marker is written after its shards, so a unit is either done or done again;
the shards are the same bytes each time.
"""

import collections
import dataclasses
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from orchestrator import storage
from orchestrator.data.formats import base
from orchestrator.data.formats.base import Bad, Format, Sample, Unit
from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image
from orchestrator.data.images.decode import read_size
from orchestrator.data.index import SHARD_SCHEMA, LabelKind, Shard
from orchestrator.data.packing.known import Known
from orchestrator.data.packing.recode import Recode
from orchestrator.data.packing.settings import PackSettings

_LABEL_TYPES = {"class": pa.int64(), "multi": pa.list_(pa.int32()), "float": pa.float64()}

# Bad samples of a unit that are named one by one (200 bytes each); the others are counted.
MAX_NAMED_BAD = 10_000


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What became of a unit: the content of its marker."""

    digest: str
    """Of the unit's items and the settings."""
    shards: tuple[Shard, ...]
    bad: tuple[Bad, ...]
    images_of_label: dict[int, int]
    """Images of each class, in all splits."""
    train_of_label: dict[int, int]
    """Images of each class to train on."""
    known: str
    """Its items, to recognise them when the source has grown; see known.py."""
    source_bytes: int = 0
    """Bytes of its images before they were encoded again."""
    weight: int = 0
    """Its share of the work; see `Unit.weight`."""

    @property
    def images(self) -> int:
        """Images in the unit's shards."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> str:
        """Return the marker's text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "UnitResult":
        """Read a marker."""
        content = json.loads(text)
        for counts in ("images_of_label", "train_of_label"):
            content[counts] = {int(k): n for k, n in content[counts].items()}
        content["bad"] = tuple(Bad(**bad) for bad in content["bad"])
        content["shards"] = tuple(
            Shard(**{**shard, "chunk_rows": tuple(shard["chunk_rows"])})
            for shard in content["shards"]
        )
        return cls(**content)


def marker_uri(out: str, unit_name: str) -> str:
    """Return where the marker of a unit lies."""
    return storage.join(out, "units", f"{unit_name}.json")


def pack_unit(unit: Unit, out: str, settings: PackSettings, source: Format) -> UnitResult:
    """Write a unit's shards and marker below `out`, or find that an earlier run did.

    Raises:
        StorageError: something other than a missing file went wrong.
        UserError: a label is none of the classes.
    """
    marker = marker_uri(out, unit.name)
    digest = _digest(unit, settings, source)
    done = read_marker(marker)
    if done is not None and done.digest == digest and _has_shards(out, done):
        return done
    if done is not None:
        # Killed between a shard and the marker, it would vouch for another's shard.
        storage.delete_file(marker)
    packing = _Packing(unit, out, settings, source)
    for sample in source.read(unit.items):
        packing.add(sample)
    result = packing.finish(digest)
    storage.write_atomic(marker, result.to_json().encode())
    return result


def _digest(unit: Unit, settings: PackSettings, source: Format) -> str:
    digest = xxhash.xxh3_128(json.dumps(settings.content()).encode())
    digest.update(source.labels.digest.encode())
    for field in dataclasses.fields(source):  # type: ignore[arg-type]  # every format is one
        if field.name != "labels":  # columns, named splits and the like
            digest.update(base.encode_id(f"{field.name}={getattr(source, field.name)!r}\0"))
    for item in unit.items:
        digest.update(base.encode_id(f"{item.id}\0{item.stamp}\0"))
    return digest.hexdigest()


def read_marker(marker: str) -> UnitResult | None:
    """Return what became of a unit, or None where that has to be done again."""
    try:
        return UnitResult.from_json(storage.read_bytes(marker))
    except storage.MissingError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, storage.StorageError):
            raise
        return None  # written by another version: the unit is packed again


def _has_shards(out: str, done: UnitResult) -> bool:
    return all(storage.size(storage.join(out, s.path)) == s.bytes for s in done.shards)


class _Packing:
    """One unit on its way into shards."""

    def __init__(self, unit: Unit, out: str, settings: PackSettings, source: Format) -> None:
        self._unit, self._out, self._settings = unit, out, settings
        self._kind, self._named = source.labels.kind, source.named_splits
        self._recode = Recode(settings.max_side, settings.quality)
        self._writers: dict[str, _ShardWriter] = {}
        self._written = collections.Counter[str]()
        self._shards: list[Shard] = []
        self._bad: list[Bad] = []
        self._more_bad = collections.Counter[str]()
        self._ids = set[int]()
        self._images: dict[str, collections.Counter[int]] = collections.defaultdict(
            collections.Counter
        )
        self._source_bytes = 0

    def add(self, sample: Sample | Bad) -> None:
        if isinstance(sample, Bad):
            self._leave_out(sample)
            return
        try:
            row = self._row(sample)
        except BadImage as error:
            self._leave_out(Bad.of(sample.uri, sample.id, error, sample.image))
            return
        self._source_bytes += len(sample.image)
        split = sample.split or self._settings.split_of(sample.id, named=self._named)
        writer = self._writers.get(split) or self._start(split)
        writer.add(row)
        label = sample.label
        labels = label if isinstance(label, tuple) else (label,) if self._kind == "class" else ()
        self._images[split].update(labels)  # type: ignore[arg-type]  # classes only
        # An item may be a tar of any size, so a shard is cut here as well.
        if writer.rows >= self._settings.unit_images or writer.bytes >= base.UNIT_BYTES:
            self._end(split)

    def _leave_out(self, bad: Bad) -> None:
        if len(self._bad) < MAX_NAMED_BAD:
            self._bad.append(bad)
        else:  # an item may hold any number of them
            self._more_bad[bad.reason.partition(":")[0]] += 1

    def _all_bad(self) -> tuple[Bad, ...]:
        where = self._unit.items[0].id
        more = (
            Bad.of(where, where, f"{reason}: and {count:,} more in this unit")
            for reason, count in sorted(self._more_bad.items())
        )
        return (*self._bad, *more)

    def _row(self, sample: Sample) -> dict[str, Any]:
        image = sample.image
        # All of it, once: training decodes only what a crop shows (0.8 ms a photograph of 95 kB).
        check_image(image)
        size = read_size(image)
        if self._settings.max_side or self._settings.quality:
            image = self._recode.apply(image, width=size.width, height=size.height)
            size = read_size(image)
        try:
            sample.id.encode()
        except UnicodeEncodeError as error:
            raise BadImage("bad_name", "the name is not UTF-8") from error
        known = xxhash.xxh3_64_intdigest(sample.id.encode())
        if known in self._ids:
            raise BadImage("duplicate", "an earlier sample has the same id")
        self._ids.add(known)
        row = {
            "id": sample.id,
            "image": image,
            "label": sample.label,
            "width": size.width,
            "height": size.height,
            "checksum": xxhash.xxh3_64_intdigest(image),
        }
        if self._kind == "none":
            del row["label"]
        return row

    def _start(self, split: str) -> "_ShardWriter":
        number = self._written[split]
        self._written[split] += 1
        name = self._unit.name.replace("/", "-") + (f"-{number:04d}" if number else "")
        schema = shard_schema(self._kind)
        writer = _ShardWriter(split, f"{split}/{name}.parquet", self._settings.chunk_rows, schema)
        self._writers[split] = writer
        return writer

    def _end(self, split: str) -> None:
        self._shards.append(self._writers.pop(split).close(self._out))

    def finish(self, digest: str) -> UnitResult:
        for split in list(self._writers):
            self._end(split)
        return UnitResult(
            digest=digest,
            shards=tuple(self._shards),
            bad=self._all_bad(),
            images_of_label=dict(sum(self._images.values(), collections.Counter())),
            train_of_label=dict(self._images["train"]),
            known=Known.of(self._unit.items).to_text(),
            source_bytes=self._source_bytes,
            weight=self._unit.weight,
        )


def shard_schema(kind: LabelKind) -> pa.Schema:
    """Return the columns of a shard whose labels are of this kind."""
    at = SHARD_SCHEMA.get_field_index("label")
    if kind == "none":
        return SHARD_SCHEMA.remove(at)
    return SHARD_SCHEMA.set(at, pa.field("label", _LABEL_TYPES[kind]))


class _ShardWriter:
    """Collects one shard in memory, chunk by chunk."""

    def __init__(self, split: str, path: str, chunk_rows: int, schema: pa.Schema) -> None:
        self._split = split
        self._path = path
        self._chunk_rows = chunk_rows
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._written: list[int] = []
        self._content = xxhash.xxh3_64()
        self._buffer = io.BytesIO()
        self.rows = self.bytes = 0
        # The images are compressed already, and statistics would copy two of them into the footer.
        self._parquet = pq.ParquetWriter(
            self._buffer,
            schema,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
            # Of ids and labels nothing else would tell a flipped bit (0.02 ms an image to check).
            write_page_checksum=True,
        )

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.rows += 1
        self.bytes += len(row["image"])
        described = json.dumps([row["id"], row.get("label")]).encode()
        self._content.update(row["checksum"].to_bytes(8, "little") + described)
        if len(self._rows) == self._chunk_rows:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._parquet.write_table(table, row_group_size=len(self._rows))
        self._written.append(len(self._rows))
        self._rows.clear()

    def close(self, out: str) -> Shard:
        if self._rows:
            self._flush()
        self._parquet.close()
        content = self._buffer.getvalue()
        storage.write_atomic(storage.join(out, self._path), content)
        return Shard(
            split=self._split,
            path=self._path,
            rows=sum(self._written),
            bytes=len(content),
            content=self._content.intdigest(),
            chunk_rows=tuple(self._written),
        )
