"""Which chunks exist: the index of a packed data set, its writing, reading and digest.

A packed folder holds `INDEX.json` (written last: without it there is no data set), a Parquet table
with one row a shard, and the shards. Everything is named relative to the folder, so a copy of it is
the same data set, with the same digest and therefore the same order of samples.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.stream import ChunkSizes, Ints

INDEX_FILE = "INDEX.json"
FORMAT = 1
SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("checksum", pa.uint64()),  # xxh3_64 of the image's bytes
    ]
)
_TABLE_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("content", pa.uint64()),
        ("chunk_rows", pa.list_(pa.int32())),
    ]
)
# Shards whose size is compared with the index before a run: enough to notice a data set that was
# overwritten, few enough (64 requests) to cost a second at any scale. Every chunk is checked when
# it is read.
_SAMPLED_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file of encoded images."""

    split: str
    """train, val or test."""
    path: str
    """Relative to the packed folder."""
    rows: int
    bytes: int
    content: int
    """xxh3_64 over the checksums of its images, in order."""
    chunk_rows: tuple[int, ...]
    """Rows of each row group."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Totals of one split."""

    samples: int
    chunks: int
    shards: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Index:
    """A packed data set."""

    uri: str
    digest: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    settings: dict[str, Any]
    """What it was packed with: source, row group size, fractions."""
    quarantined: int
    """Images left out because they could not be read; the reasons are in `quarantine.parquet`."""
    table: str
    """File name of the shard table."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """All chunks of one split, numbered from 0 in the order of the shard table."""

    uri: str
    sizes: ChunkSizes
    paths: pa.Array
    """Relative shard paths, strings, shape (shards,)."""
    first_chunk: Ints
    """Number of each shard's first chunk, and the total last, shape (shards + 1,)."""

    def locate(self, chunk: int) -> tuple[str, int]:
        """Return the shard's URI and the row group of a chunk."""
        shard = int(np.searchsorted(self.first_chunk, chunk, side="right")) - 1
        uri = storage.join(self.uri, self.paths[shard].as_py())
        return uri, chunk - int(self.first_chunk[shard])


def write_index(
    uri: str,
    *,
    classes: Iterable[str],
    shards: Iterable[Shard],
    settings: dict[str, Any],
    quarantined: int,
) -> Index:
    """Write the shard table, then `INDEX.json`, and return the index."""
    ordered = sorted(shards, key=lambda shard: (shard.split, shard.path))
    class_names = tuple(classes)
    digest = _digest(class_names, ordered)
    index = Index(
        uri=uri,
        digest=digest,
        classes=class_names,
        splits=_totals(ordered),
        settings=settings,
        quarantined=quarantined,
        table=f"shards-{digest[:16]}.parquet",
    )
    rows = [dataclasses.asdict(shard) for shard in ordered]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_TABLE_SCHEMA), buffer)
    storage.write_atomic(storage.join(uri, index.table), buffer.getvalue())
    content = {"format": FORMAT, **dataclasses.asdict(index)}
    del content["uri"]
    storage.write_atomic(storage.join(uri, INDEX_FILE), json.dumps(content, indent=1).encode())
    return index


def _totals(shards: list[Shard]) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for shard in shards:
        total = splits.get(shard.split, Split(0, 0, 0, 0))
        splits[shard.split] = Split(
            total.samples + shard.rows,
            total.chunks + len(shard.chunk_rows),
            total.shards + 1,
            total.bytes + shard.bytes,
        )
    return splits


def _digest(classes: tuple[str, ...], shards: list[Shard]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, classes]).encode())
    for shard in shards:
        digest.update(json.dumps(dataclasses.astuple(shard)).encode())
    return digest.hexdigest()


def read_index(uri: str) -> Index:
    """Read the index of a packed folder.

    Raises:
        UserError: there is none, or it was written by another version.
        StorageError: it cannot be read.
    """
    location = storage.join(uri, INDEX_FILE)
    if not storage.exists(location):
        raise UserError(
            f"{uri} holds no {INDEX_FILE}, so it is no packed data set or its packing was "
            f"interrupted; run `orchestrator pack --source ... --out {uri}` (again)."
        )
    try:
        content = json.loads(storage.read_bytes(location))
        if content.pop("format") != FORMAT:
            raise UserError(f"{location} has another format than {FORMAT}; pack the data again.")
        splits = {name: Split(**split) for name, split in content.pop("splits").items()}
        classes = tuple(content.pop("classes"))
        return Index(uri=uri, classes=classes, splits=splits, **content)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{location} is damaged ({error!r}); pack the data again.") from error


def read_shards(index: Index) -> list[Shard]:
    """Read the shard table and check it against the index's digest.

    Raises:
        UserError: the table no longer has the digest that `INDEX.json` names.
    """
    rows = _read_table(index).to_pylist()
    shards = [Shard(**{**row, "chunk_rows": tuple(row["chunk_rows"])}) for row in rows]
    if _digest(index.classes, shards) != index.digest:
        raise UserError(
            f"{storage.join(index.uri, index.table)} does not have the digest "
            f"{index.digest[:12]} that {INDEX_FILE} names, so one of them was changed; pack again."
        )
    return shards


def _read_table(index: Index) -> pa.Table:
    location = storage.join(index.uri, index.table)
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(location)), schema=_TABLE_SCHEMA)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{location} is damaged ({error}); pack the data again.") from error


def verify(index: Index) -> None:
    """Check the shard table's digest and the sizes of up to 64 evenly spaced shards.

    Raises:
        UserError: the shards are no longer those that were indexed.
    """
    shards = read_shards(index)
    picks = np.unique(np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).astype(int))
    for shard in (shards[i] for i in picks):
        location = storage.join(index.uri, shard.path)
        found = storage.size(location)
        if found != shard.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"{location} {state} but the index says {shard.bytes} bytes, so the index's digest "
                "no longer matches its shards; restore the shard or pack again."
            )


def read_chunks(index: Index, split: str) -> Chunks:
    """Read where the chunks of one split lie and how many rows each has.

    Raises:
        UserError: the index has no such split.
    """
    if split not in index.splits:
        raise UserError(
            f"{index.uri} has no split {split!r}, only {', '.join(index.splits)}; pack it with "
            f"--{split}-fraction above 0."
        )
    table = _read_table(index)
    table = table.filter(pa.compute.equal(table["split"], split)).combine_chunks()
    lengths = pa.compute.list_value_length(table["chunk_rows"]).to_numpy()
    rows = pa.compute.list_flatten(table["chunk_rows"]).to_numpy()
    return Chunks(
        uri=index.uri,
        sizes=ChunkSizes.from_rows(rows),
        paths=table["path"].combine_chunks(),
        first_chunk=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
