"""The table of all shards behind an index: columns, never an object for each shard.

One row a shard, sorted by split and path. Packing gives all chunks of a shard but its last the same
number of rows, so three integers say where its chunks end; only irregular shards list them. A
hundred bytes a shard: 10^10 images in shards of 4096 are 2.4 million rows.
"""

import collections
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.stream import ChunkSizes, Ints

_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("content", pa.uint64()),
        ("etag", pa.string()),
        ("chunks", pa.int32()),
        ("chunk_rows", pa.int32()),  # of every chunk but the last; 0 where `irregular` says it
        ("last_rows", pa.int32()),
        ("irregular", pa.list_(pa.int32())),  # rows of every chunk; empty for a regular shard
    ]
)
CHUNK_COLUMNS = ("path", "bytes", "etag", "chunks", "chunk_rows", "last_rows", "irregular")
# Shards turned from objects to columns, or back, at a time.
_BATCH_SHARDS = 4096
# A row group of the table takes 20 MB in memory: what checking the digest needs.
_GROUP_SHARDS = 1 << 18


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file of encoded images."""

    split: str
    """train, val or test."""
    path: str
    """Relative to the packed folder, or an absolute URI of a file that was indexed in place."""
    rows: int
    bytes: int
    content: int
    """xxh3_64 over the checksums of its images, in order."""
    chunk_rows: tuple[int, ...]
    """Rows of each row group, each at least 1."""
    etag: str = ""
    """As the storage reported it when the file was indexed in place."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Totals of one split."""

    samples: int
    chunks: int
    shards: int
    bytes: int


class ShardColumns:
    """Collects shards in columns: some hundred bytes each, where objects would take a kilobyte."""

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._pending: list[Shard] = []
        for shard in shards:
            self.add(shard)

    def add(self, shard: Shard) -> None:
        """Take one shard.

        Raises:
            UserError: it has no rows, or a row group without rows.
        """
        if not shard.chunk_rows or min(shard.chunk_rows) < 1:
            raise UserError(
                f"shard {shard.path} has no row group, or one without rows, so there is nothing to "
                "train on in it; leave the file out or write it again."
            )
        assert sum(shard.chunk_rows) == shard.rows, shard.path
        self._pending.append(shard)
        if len(self._pending) == _BATCH_SHARDS:
            self._flush()

    def table(self) -> pa.Table:
        """Return all shards, sorted by split and path."""
        self._flush()
        table = pa.Table.from_batches(self._batches, schema=_SCHEMA)
        return table.sort_by([("split", "ascending"), ("path", "ascending")])

    def _flush(self) -> None:
        if self._pending:
            rows = [_row(shard) for shard in self._pending]
            self._batches.append(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
            self._pending.clear()


def _row(shard: Shard) -> dict[str, object]:
    *body, last = shard.chunk_rows
    usual = body[0] if body else last
    regular = body.count(usual) == len(body)
    return {
        "split": shard.split,
        "path": shard.path,
        "rows": shard.rows,
        "bytes": shard.bytes,
        "content": shard.content,
        "etag": shard.etag,
        "chunks": len(shard.chunk_rows),
        "chunk_rows": usual if regular else 0,
        "last_rows": last if regular else 0,
        "irregular": () if regular else shard.chunk_rows,
    }


def totals(table: pa.Table) -> dict[str, Split]:
    """Return the totals of each split, sorted by name."""
    sums = [(name, "sum") for name in ("rows", "chunks", "bytes")] + [("path", "count")]
    rows = table.group_by("split").aggregate(sums).sort_by("split").to_pylist()
    return {
        row["split"]: Split(row["rows_sum"], row["chunks_sum"], row["path_count"], row["bytes_sum"])
        for row in rows
    }


def write_table(uri: str, table: pa.Table) -> None:
    """Write the table so that a reader finds all of it or none."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=_GROUP_SHARDS)
    storage.write_atomic(uri, buffer.getvalue())


def read_blocks(
    uri: str, *, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
) -> Iterator[pa.Table]:
    """Yield the rows [start, stop) of a shard table, one row group at a time.

    Args:
        uri: of the table.
        columns: only these are read; None: all.
        start: first row.
        stop: row after the last; None: to the end.

    Raises:
        UserError: it is not a shard table.
    """
    try:
        with storage.open_input(uri) as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)
            if not parquet.schema_arrow.equals(_SCHEMA):
                raise UserError(f"{uri} is damaged (other columns); pack the data again.")
            ends = np.cumsum(
                [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            )
            for group, end in enumerate(ends.tolist()):
                first = end - parquet.metadata.row_group(group).num_rows
                low, high = max(start, first), end if stop is None else min(stop, end)
                if low < high:
                    block = parquet.read_row_group(group, columns=columns, use_threads=False)
                    yield block.slice(low - first, high - low)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri} is damaged ({error}); pack the data again.") from error


def shards_of(block: pa.Table) -> Iterator[Shard]:
    """Yield the shards of a block as objects."""
    for start in range(0, block.num_rows, _BATCH_SHARDS):
        for row in block.slice(start, _BATCH_SHARDS).to_pylist():
            chunks, usual, last = row.pop("chunks"), row.pop("chunk_rows"), row.pop("last_rows")
            irregular = tuple(row.pop("irregular"))
            yield Shard(**row, chunk_rows=irregular or (*[usual] * (chunks - 1), last))


def digest(head: str, blocks: Iterable[pa.Table]) -> str:
    """Return the SHA-256 of a text and of every value of a table, however it is cut into blocks."""
    columns = {name: hashlib.sha256(name.encode()) for name in _SCHEMA.names}
    values = {name: hashlib.sha256() for name in _SCHEMA.names}
    for block in blocks:
        for name in _SCHEMA.names:
            for chunk in block[name].chunks:
                fixed, variable = _content(chunk)
                columns[name].update(fixed.data)
                values[name].update(variable.data)
    whole = hashlib.sha256(head.encode())
    for name in _SCHEMA.names:
        whole.update(columns[name].digest() + values[name].digest())
    return whole.hexdigest()


def _content(column: pa.Array) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Return a column's numbers, or its lengths and what they are lengths of."""
    empty = np.empty(0, dtype=np.uint8)
    if pa.types.is_string(column.type):
        lengths = pa.compute.binary_length(column).to_numpy()
        _, offsets, data = column.buffers()
        start = int(np.frombuffer(offsets, dtype=np.int32)[column.offset])
        stop = start + int(lengths.sum(dtype=np.int64))
        return lengths, empty if data is None else np.frombuffer(data, np.uint8)[start:stop]
    if pa.types.is_list(column.type):
        lengths = pa.compute.list_value_length(column).to_numpy()
        return lengths, pa.compute.list_flatten(column).to_numpy()
    return column.to_numpy(), empty


def chunk_sizes(table: pa.Table) -> tuple[ChunkSizes, Ints]:
    """Return the rows of every chunk, and the number of each shard's first one.

    The second is of shape (shards + 1,): it ends with the number of chunks. Memory is proportional
    to the shards and to the chunks of another size than most.
    """
    chunks, usual, last = (table[name].to_numpy() for name in ("chunks", "chunk_rows", "last_rows"))
    first = np.concatenate([[0], np.cumsum(chunks, dtype=np.int64)])
    irregular = np.flatnonzero(last == 0)
    listed = pa.compute.list_flatten(table["irregular"]).to_numpy()
    most = _most_frequent((usual, chunks - 1), (last, last > 0), (listed, listed > 0))
    body = np.flatnonzero((usual != most) & (last != 0))
    ends = np.flatnonzero((last != most) & (last != 0))
    numbers = np.concatenate(
        [
            _ranges(first[body], chunks[body] - 1),
            first[ends + 1] - 1,
            _ranges(first[irregular], chunks[irregular]),
        ]
    )
    rows = np.concatenate([np.repeat(usual[body], chunks[body] - 1), last[ends], listed])
    numbers, rows = numbers[rows != most], rows[rows != most].astype(np.int64)
    order = np.argsort(numbers, kind="stable")
    return ChunkSizes(int(first[-1]), most, numbers[order], rows[order]), first


def _most_frequent(*counted: tuple[npt.NDArray[np.int32], npt.NDArray[np.generic]]) -> int:
    """Return the positive value with the largest sum of weights, of (values, weights) pairs."""
    totals = collections.Counter[int]()
    for values, weights in counted:
        pairs = pa.table({"value": values, "weight": weights.astype(np.int64)})
        sums = pairs.group_by("value", use_threads=False).aggregate([("weight", "sum")])
        totals.update(dict(zip(*sums.to_pydict().values(), strict=True)))
    del totals[0]
    return max(totals, key=lambda value: (totals[value], -value))


def _ranges(first: Ints, counts: Ints) -> Ints:
    """Return first[0], first[0] + 1, ... (counts[0] of them), first[1], ... as one array."""
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum())
