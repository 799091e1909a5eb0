"""One chunk of a shard -> the columns of its samples. Pure but for storage."""

import dataclasses
import functools
import os
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.index import ChunkRef

# Footers of shards, kept by each read process: a window's chunks come from many shards.
_CACHED_FOOTERS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkColumns:
    """The samples of one chunk, as Arrow arrays of `rows` values each."""

    uri: str
    """Of the shard, with `#` and the number of its row group."""
    columns: dict[str, pa.Array]
    """image, and where the shards have them id, label, checksum."""


def read_chunk(ref: ChunkRef, columns: Mapping[str, str]) -> ChunkColumns:
    """Read one row group.

    Args:
        ref: where it lies.
        columns: what we call a column -> its name in the shard; `image.bytes` is a struct's field.

    Raises:
        UserError: the shard is not the one that was indexed.
    """
    try:
        with storage.open_input(ref.uri) as file:
            shard = pq.ParquetFile(file, metadata=_footer(ref.uri, os.getpid()), pre_buffer=True)
            names = list(columns.values())
            table = shard.read_row_group(ref.group, columns=names, use_threads=False)
    except (pa.ArrowInvalid, pa.ArrowKeyError, IndexError) as error:
        raise UserError(
            f"{ref.uri} row group {ref.group} cannot be read ({_first_line(error)}), so the shard "
            "is not the one that was indexed; restore it or pack again."
        ) from error
    if table.num_rows != ref.rows:
        raise UserError(
            f"{ref.uri} row group {ref.group} has {table.num_rows} rows but the index says "
            f"{ref.rows}, so the index's digest no longer matches its shards; restore the shard or "
            "pack again."
        )
    found = {ours: _column(table, name, ref.uri) for ours, name in columns.items()}
    return ChunkColumns(f"{ref.uri}#{ref.group}", found)


def _column(table: pa.Table, name: str, uri: str) -> pa.Array:
    head, *fields = name.split(".")
    if head not in table.column_names:
        raise UserError(f"{uri} has no column {head!r}; pack the data again.")
    column = table[head].combine_chunks()
    for field in fields:
        column = column.field(field)
    return column


@functools.lru_cache(maxsize=_CACHED_FOOTERS)
def _footer(uri: str, pid: int) -> pq.FileMetaData:
    with storage.open_input(uri) as file:
        return pq.read_metadata(file)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
