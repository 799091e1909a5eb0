"""The work of one packing task: a unit of files -> one shard for each split, then its marker.

Needs no Ray. A unit's marker is written after its shards, so a unit is either done or done again;
the shards are the same bytes each time.
"""

import collections
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.decode import BadImage, read_size
from orchestrator.data.imagefolder import UNIT_BYTES, File, Unit, encode_id
from orchestrator.data.index import SHARD_SCHEMA, Shard

# Reads in flight in one task: a request to S3 takes some 20 ms, of which s3fs computes 3 ms, so
# about this many keep a task's CPU busy.
_READ_THREADS = 16
_READ_AHEAD = 32


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """What decides the content of the shards."""

    source: str
    chunk_rows: int
    """Rows of every row group but a shard's last."""
    unit_images: int
    """Most images of one task, and so of one shard."""
    val_fraction: float
    test_fraction: float

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: naming the flag.
        """
        for flag, value in (("chunk-rows", self.chunk_rows), ("unit-images", self.unit_images)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, but it is {value}; raise it.")
        shares = {"val": self.val_fraction, "test": self.test_fraction}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise UserError(
                    f"--{name}-fraction must be at least 0 and less than 1, but it is {share}; "
                    "0.1 is usual."
                )
        if sum(shares.values()) >= 1:
            raise UserError(
                f"--val-fraction {self.val_fraction} and --test-fraction {self.test_fraction} "
                "leave nothing to train on; together they must be less than 1."
            )

    def fractions(self) -> dict[str, float]:
        """Return the share of images that each split should get."""
        held_out = {"val": self.val_fraction, "test": self.test_fraction}
        return {"train": 1 - sum(held_out.values()), **held_out}

    def split_of(self, sample_id: str) -> str:
        """Return the split of an image: by its id alone, never by order or by other images."""
        place = xxhash.xxh3_64_intdigest(encode_id(sample_id)) / 2**64
        if place < self.val_fraction:
            return "val"
        return "test" if place < self.val_fraction + self.test_fraction else "train"


@dataclasses.dataclass(frozen=True)
class Bad:
    """A file that is left out."""

    uri: str
    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What became of a unit: the content of its marker."""

    digest: str
    """Of the unit's files, their sizes and labels, and the settings."""
    shards: tuple[Shard, ...]
    bad: tuple[Bad, ...]
    images_of_label: dict[int, int]

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
        return cls(
            digest=content["digest"],
            shards=tuple(
                Shard(**{**shard, "chunk_rows": tuple(shard["chunk_rows"])})
                for shard in content["shards"]
            ),
            bad=tuple(Bad(**bad) for bad in content["bad"]),
            images_of_label={int(k): n for k, n in content["images_of_label"].items()},
        )


def pack_unit(unit: Unit, out: str, settings: PackSettings) -> UnitResult:
    """Write a unit's shards and marker below `out`, or find that an earlier run did.

    Raises:
        StorageError: something other than a missing file went wrong.
    """
    marker = storage.join(out, "units", f"{unit.name}.json")
    digest = _digest(unit, settings)
    done = _read_marker(marker)
    if done is not None and done.digest == digest and _has_shards(out, done):
        return done
    writers: dict[str, _ShardWriter] = {}
    bad, images = list[Bad](), collections.Counter[int]()
    for file, content in _read_files(unit.files, settings.source):
        try:
            row = _row(file, content)
        except BadImage as error:
            bad.append(_bad(file, settings.source, str(error)))
            continue
        split = settings.split_of(file.id)
        if split not in writers:
            writers[split] = _ShardWriter(
                split, f"{split}/{unit.name}.parquet", settings.chunk_rows
            )
        writers[split].add(row)
        images[file.label] += 1
    shards = tuple(writer.close(out) for writer in writers.values())
    result = UnitResult(digest, shards, tuple(bad), dict(images))
    storage.write_atomic(marker, result.to_json().encode())
    return result


def _digest(unit: Unit, settings: PackSettings) -> str:
    digest = xxhash.xxh3_128(json.dumps(dataclasses.asdict(settings)).encode())
    for file in unit.files:
        digest.update(encode_id(file.id) + f"\0{file.size}\0{file.label}\0".encode())
    return digest.hexdigest()


def _read_marker(marker: str) -> UnitResult | None:
    if not storage.exists(marker):
        return None
    try:
        return UnitResult.from_json(storage.read_bytes(marker))
    except (ValueError, KeyError, TypeError):
        return None  # written by another version: the unit is packed again


def _has_shards(out: str, done: UnitResult) -> bool:
    return all(storage.size(storage.join(out, s.path)) == s.bytes for s in done.shards)


def _read_files(files: Iterable[File], source: str) -> Iterator[tuple[File, "Future[bytes]"]]:
    """Yield files with their coming content, in order, some requests ahead."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        pending = collections.deque[tuple[File, Future[bytes]]]()
        for file in files:
            pending.append((file, pool.submit(_read, file, storage.join(source, file.id))))
            if len(pending) > _READ_AHEAD:
                yield pending.popleft()
        while pending:
            yield pending.popleft()


def _read(file: File, uri: str) -> bytes:
    if file.size > UNIT_BYTES:
        raise BadImage("too_large", f"the file has {file.size} bytes, more than {UNIT_BYTES}")
    try:
        return storage.read_bytes(uri)
    except storage.StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise BadImage("missing", "it was listed but is gone, or links to nothing") from error
        raise


def _row(file: File, content: "Future[bytes]") -> dict[str, Any]:
    image = content.result()
    size = read_size(image)
    try:
        file.id.encode()
    except UnicodeEncodeError as error:
        raise BadImage("bad_name", "the name is not UTF-8") from error
    return {
        "id": file.id,
        "image": image,
        "label": file.label,
        "width": size.width,
        "height": size.height,
        "checksum": xxhash.xxh3_64_intdigest(image),
    }


def _bad(file: File, source: str, reason: str) -> Bad:
    name = encode_id(file.id).decode(errors="backslashreplace")
    return Bad(uri=storage.join(source, name), id=name, reason=reason)


class _ShardWriter:
    """Collects one shard in memory, chunk by chunk."""

    def __init__(self, split: str, path: str, chunk_rows: int) -> None:
        self._split = split
        self._path = path
        self._chunk_rows = chunk_rows
        self._rows: list[dict[str, Any]] = []
        self._written: list[int] = []
        self._content = xxhash.xxh3_64()
        self._buffer = io.BytesIO()
        # The images are compressed already, and statistics would copy two of them into the footer.
        self._parquet = pq.ParquetWriter(
            self._buffer,
            SHARD_SCHEMA,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
        )

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._content.update(row["checksum"].to_bytes(8, "little"))
        if len(self._rows) == self._chunk_rows:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=SHARD_SCHEMA)
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
