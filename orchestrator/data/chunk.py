"""One chunk of a shard -> the columns of its samples. Pure but for storage.

Two requests at most: one for the end of the shard, where its footer lies (footers are kept), and
one for the columns of the row group. pyarrow then decodes from those bytes without asking again.
"""

import bisect
import dataclasses
import functools
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.places import ChunkRef

# Footers of shards, kept by each read process: a window's chunks come from many shards.
_CACHED_FOOTERS = 256
# The footer of a shard of 64 row groups is 40 kB; a longer one costs a second request.
_TAIL_BYTES = 64 << 10
_TRAILER_BYTES = 8  # its length and the magic word


_LOST = {
    storage.MissingError: "missing",
    storage.DeniedError: "denied",
    storage.ChangedError: "changed",
}


class DoubtfulError(UserError):
    """A shard that does not fit its index, or a byte that flipped on the way: look again."""


class LostChunk(Exception):
    """A chunk that storage no longer has as it was indexed; none of its samples can be read.

    Attributes:
        reason: missing, denied, changed or damaged.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkColumns:
    """The samples of one chunk, as Arrow arrays of `rows` values each."""

    uri: str
    """Of the shard, with `#` and the number of its row group."""
    columns: dict[str, pa.Array]
    """Of id, label and checksum those that the shards have."""
    images: list[memoryview]
    """Encoded images, views of the chunk's bytes; empty where there is none."""

    def changed_rows(self) -> frozenset[int]:
        """Return the rows whose image does not have the checksum that was packed with it."""
        if "checksum" not in self.columns:
            return frozenset()
        expected = self.columns["checksum"].to_pylist()
        return frozenset(
            row
            for row, (image, checksum) in enumerate(zip(self.images, expected, strict=True))
            if checksum is not None and xxhash.xxh3_64_intdigest(image) != checksum
        )


def read_chunk(ref: ChunkRef, columns: Mapping[str, str]) -> ChunkColumns:
    """Read one row group.

    Args:
        ref: where it lies.
        columns: what we call a column -> its name in the shard; `image.bytes` is a struct's field.

    Raises:
        LostChunk: it is gone, may not be read, or is not what was indexed.
        StorageError: storage does not answer, or refuses everything.
        DoubtfulError: the shard has no such column.
    """
    try:
        table = _read_table(ref, list(columns.values()))
        found = {ours: _column(table, name, ref.uri) for ours, name in columns.items()}
        images = _views(found.pop("image"))
    except storage.LockedOutError:
        raise
    except tuple(_LOST) as error:
        raise LostChunk(_LOST[type(error)], _first_line(error)) from error
    except UserError:
        raise
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
        place = f"{ref.uri} row group {ref.group}"
        raise LostChunk("damaged", f"{place}: {_first_line(error)}") from error
    if table.num_rows != ref.rows:
        raise LostChunk(
            "changed",
            f"{ref.uri} row group {ref.group} has {table.num_rows} rows, the index says {ref.rows}",
        )
    return ChunkColumns(f"{ref.uri}#{ref.group}", found, images)


def _read_table(ref: ChunkRef, names: list[str]) -> pa.Table:
    footer = _footer(ref.uri, ref.bytes, ref.etag, os.getpid())
    group = footer.row_group(ref.group)
    ranges = []
    for number in range(group.num_columns):
        column = group.column(number)
        path = f"{column.path_in_schema}."
        if any(path.startswith(f"{name}.") for name in names):
            start = column.dictionary_page_offset or column.data_page_offset
            ranges.append((start, start + column.total_compressed_size))
    parts = storage.read_ranges(ref.uri, ranges, etag=ref.etag or None, size=ref.bytes)
    file = pq.ParquetFile(
        _Parts(ranges, parts, ref.bytes),
        metadata=footer,
        pre_buffer=False,
        page_checksum_verification=True,
    )
    return file.read_row_group(ref.group, columns=names, use_threads=False)


def forget_footers() -> None:
    """Read footers afresh from now on: one may have been damaged on its way."""
    _footer.cache_clear()


@functools.lru_cache(maxsize=_CACHED_FOOTERS)
def _footer(uri: str, num_bytes: int, etag: str, pid: int) -> pq.FileMetaData:
    start = max(0, num_bytes - _TAIL_BYTES)
    (tail,) = storage.read_ranges(uri, [(start, num_bytes)], etag=etag or None, size=num_bytes)
    length = int.from_bytes(tail[-_TRAILER_BYTES:-4], "little") + _TRAILER_BYTES
    if len(tail) < length <= num_bytes:
        first = num_bytes - length
        (tail,) = storage.read_ranges(uri, [(first, num_bytes)], etag=etag or None, size=num_bytes)
    return pq.read_metadata(pa.BufferReader(tail))


class _Parts(io.RawIOBase):
    """A file of which only some ranges are there."""

    def __init__(self, ranges: list[tuple[int, int]], parts: list[Any], size: int) -> None:
        super().__init__()
        pairs = sorted(zip(ranges, parts, strict=True), key=lambda pair: pair[0])
        self._starts = [first for (first, _), _ in pairs]
        self._parts = [pa.py_buffer(part) for _, part in pairs]
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read_buffer(self, size: int) -> pa.Buffer:
        """Return the next bytes without a copy: what pyarrow asks for where a file has it."""
        number = bisect.bisect_right(self._starts, self._at) - 1
        offset = self._at - self._starts[number]
        found = self._parts[number].slice(offset, size)
        self._at += len(found)
        return found

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._size if size is None or size < 0 else size
        content: bytes = self.read_buffer(wanted).to_pybytes()
        return content


def _column(table: pa.Table, name: str, uri: str) -> pa.Array:
    head, *fields = name.split(".")
    if head not in table.column_names:
        raise DoubtfulError(f"{uri} has no column {head!r}; pack the data again.")
    # One row group, one array: combining would copy it.
    chunks = table[head].chunks
    column = chunks[0] if len(chunks) == 1 else table[head].combine_chunks()
    for field in fields:
        column = pc.struct_field(column, field)
    return column


def _views(images: pa.Array) -> list[memoryview]:
    width = np.int64 if pa.types.is_large_binary(images.type) else np.int32
    _, offsets, data = images.buffers()
    ends = np.frombuffer(offsets, dtype=width)[images.offset : images.offset + len(images) + 1]
    # pyarrow's bytes are signed, and a view of signed bytes equals no bytes object above 127.
    whole = memoryview(data).cast("B") if data is not None else memoryview(b"")
    valid = images.is_valid().to_pylist()
    return [
        whole[start:stop] if there else whole[:0]
        for start, stop, there in zip(ends[:-1].tolist(), ends[1:].tolist(), valid, strict=True)
    ]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
