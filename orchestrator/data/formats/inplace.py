"""Parquet files that are indexed where they lie: which may be, and in which split. Pure.

A file may be if a chunk of it can be read as it is: its bytes as an image column, row groups of at
most 64 MiB and 16 to 2,048 rows, labels that need no conversion. Splits are whole files.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from orchestrator import storage
from orchestrator.data.formats.base import File, encode_id
from orchestrator.data.formats.files import file_split
from orchestrator.data.formats.labels import Labels
from orchestrator.data.packing.settings import PackSettings

MAX_GROUP_BYTES = 64 << 20
MIN_GROUP_ROWS = 16
MAX_GROUP_ROWS = 2048
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("id", pa.string()),
        ("why_not", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("content", pa.uint64()),
        ("etag", pa.string()),
        ("chunk_rows", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.struct([("label", pa.string()), ("count", pa.int64())]))),
    ]
)


def look(
    file: pq.ParquetFile,
    uri: str,
    item: File,
    labels: Labels,
    columns: Mapping[str, str],
    raws: pa.ChunkedArray | None,
) -> pa.Table:
    """Return one row of `SCHEMA`: the file as the index would name it, and why it may not be.

    Args:
        file: opened.
        uri: of the file.
        item: as listed.
        labels: how labels are read.
        columns: of the source, by our names.
        raws: the label column, or None where there is none or it cannot be read.
    """
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    row = {
        "path": uri,
        "id": item.id,
        "why_not": _why_not(file, groups, labels, columns, raws),
        "rows": file.metadata.num_rows,
        "bytes": item.size,
        "content": _content(file),
        "etag": item.etag or storage.etag(uri) or "",
        "chunk_rows": [group.num_rows for group in groups],
        "labels": _counts(labels, raws),
    }
    return pa.Table.from_pylist([row], schema=SCHEMA)


def _why_not(
    file: pq.ParquetFile,
    groups: list[Any],
    labels: Labels,
    columns: Mapping[str, str],
    raws: pa.ChunkedArray | None,
) -> str:
    if not groups or not all(group.num_rows for group in groups):
        return "it has no rows, or a row group without rows"
    body = [group.num_rows for group in groups[:-1]]
    largest = max(group.total_byte_size for group in groups)
    if max(group.num_rows for group in groups) > MAX_GROUP_ROWS or min(body, default=16) < 16:
        return f"its row groups have not between {MIN_GROUP_ROWS} and {MAX_GROUP_ROWS} rows"
    if largest > MAX_GROUP_BYTES:
        return f"a row group has {largest} bytes, more than {MAX_GROUP_BYTES}"
    if "id" in columns and not pa.types.is_string(_type(file, columns["id"])):
        return f"its ids (column {columns['id']!r}) are no text"
    if any(_nulls(group, columns["image"]) for group in groups):
        return "it has rows without an image"
    return _why_no_labels(file, labels, raws)


def _why_no_labels(file: pq.ParquetFile, labels: Labels, raws: pa.ChunkedArray | None) -> str:
    if labels.kind == "none":
        return ""
    if raws is None:
        return f"its labels (column {labels.column!r}) cannot be read"
    if raws.null_count:
        return f"{raws.null_count} rows have no label"
    kind = raws.type
    if labels.kind == "float":
        finite = pa.types.is_floating(kind) and pc.all(pc.is_finite(raws)).as_py()
        return "" if finite or pa.types.is_integer(kind) else "its labels are not finite numbers"
    if labels.kind == "multi":
        fits = pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)
        if not fits or labels.named:
            return "its labels are not lists of class numbers"
        flat = pc.list_flatten(raws)
        return "" if not len(flat) or pc.min(flat).as_py() >= 0 else "it has a label below 0"
    if pa.types.is_string(kind) and labels.named:
        trimmed = pc.utf8_trim_whitespace(raws)
        bare = pc.and_(pc.equal(trimmed, raws), pc.greater(pc.utf8_length(raws), 0))
        return "" if pc.all(bare).as_py() else "it has labels of nothing, or with spaces around"
    if not pa.types.is_integer(kind) or labels.named:
        return f"its labels are of type {kind}"
    if pc.min(raws).as_py() < 0:
        return f"it has the label {pc.min(raws).as_py()}"
    return ""


def _type(file: pq.ParquetFile, column: str) -> pa.DataType:
    return file.schema_arrow.field(column).type


def _nulls(group: Any, column: str) -> bool:
    for i in range(group.num_columns):
        part = group.column(i)
        if part.path_in_schema == column and part.is_stats_set:
            return bool(part.statistics.has_null_count and part.statistics.null_count)
    return False  # not known: reading would say so


def _content(file: pq.ParquetFile) -> int:
    """Return a hash of where every column of every row group lies: another file has another."""
    places = []
    for g in range(file.num_row_groups):
        group = file.metadata.row_group(g)
        columns = [group.column(i) for i in range(group.num_columns)]
        places.append(
            (group.num_rows, [(c.data_page_offset, c.total_compressed_size) for c in columns])
        )
    return xxhash.xxh3_64_intdigest(repr(places).encode())


def _counts(labels: Labels, raws: pa.ChunkedArray | None) -> list[dict[str, object]]:
    if raws is None or labels.kind not in ("class", "multi"):
        return []
    values = pc.list_flatten(raws) if labels.kind == "multi" else raws
    return [
        {"label": str(entry["values"]), "count": entry["counts"]}
        for entry in pc.value_counts(values).to_pylist()
        if entry["values"] is not None
    ]


def choose_splits(
    ids: Sequence[str],
    settings: PackSettings,
    named: Collection[str],
    known: Mapping[str, str],
) -> list[str]:
    """Return the split of each file, as a whole.

    Its name decides where it names val or test. Else the hash of its path does; a split that would
    get no file then gets the one with the lowest hash. A file that was indexed before stays.

    Args:
        ids: paths relative to the source.
        settings: with the wanted share of each split.
        named: splits that names fill.
        known: splits of files that were indexed before, by path.
    """
    fixed = [known.get(path) or file_split(path, named) for path in ids]
    splits = [
        split or settings.split_of(path, named=named)
        for path, split in zip(ids, fixed, strict=True)
    ]
    free = [at for at, split in enumerate(fixed) if not split]
    free.sort(key=lambda at: (xxhash.xxh3_64_intdigest(encode_id(ids[at])), ids[at]))
    for name, share in settings.fractions().items():
        if share and name not in splits and name not in named:
            others = [at for at in free if splits.count(splits[at]) > 1]
            if others:
                splits[others[0]] = name
    return splits
