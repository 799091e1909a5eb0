"""Parquet files with image bytes, or the Hugging Face struct {bytes, path}.

The first look at every file (its footer and its label column) says which class names there are and
whether the file may be indexed where it lies; see inplace.py.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats import inplace
from orchestrator.data.formats.base import UNIT_BYTES, Bad, File, Sample, Survey, read_labelled
from orchestrator.data.formats.files import (
    file_split,
    first_file,
    list_files,
    named_splits,
    root_of,
)
from orchestrator.data.formats.labels import BadLabel, Labels
from orchestrator.data.formats.request import LABEL_COLUMNS, Request

SUFFIXES = (".parquet",)
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_ID_COLUMNS = ("id", "__key__", "key", "image_id")
_FIRST_ROWS = 100
# Rows decoded at a time while copying: 64 photographs are 7 MB.
_BATCH_ROWS = 64
# Bytes decoded at a time, where the footer tells the truth.
_BATCH_BYTES = 64 << 20
# Rows of a damaged row group that are named: a damaged footer may promise any number.
_MAX_LOST_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class ParquetRows:
    """A folder of Parquet files, or one file."""

    source: str
    labels: Labels
    image: str
    """Column of the bytes; `image.bytes` is a field of a struct."""
    id: str = ""
    """Column of the ids; empty: file and row number."""
    named_splits: tuple[str, ...] = ()
    parts: int = 1
    mixes: int = 0
    needs_survey: bool = True

    def with_labels(self, labels: Labels) -> "ParquetRows":
        """Return the format with its labels read so."""
        return dataclasses.replace(self, labels=labels)

    @property
    def columns(self) -> dict[str, str]:
        """What the index calls a column -> its name here."""
        found = {"id": self.id, "image": self.image, "label": self.labels.column}
        return {ours: name for ours, name in found.items() if name}

    def items(self, part: int) -> Iterator[File]:
        """List the files."""
        return list_files(self.source, SUFFIXES)

    def uri(self, item: File) -> str:
        """Return where a file lies."""
        return storage.join(root_of(self.source, SUFFIXES), item.id)

    def survey(self, items: Iterable[File]) -> Survey:
        """Read footers and label columns."""
        found = Survey()
        for item in items:
            uri = self.uri(item)
            with storage.open_input(uri) as raw:
                file = _open(raw, uri)
                self._check_columns(file, uri)
                raws = _label_column(file, self.labels.column)
                found.merge(Survey(names=self._names(raws)))
                look = inplace.look(file, uri, item, self.labels, self.columns, raws)
            found.merge(Survey(files=look))
        return found

    def _names(self, raws: pa.ChunkedArray | None) -> set[str]:
        names = set[str]()
        if raws is None or not self.labels.named:
            return names
        values = pc.list_flatten(raws) if self.labels.kind == "multi" else raws
        for value in pc.unique(values).to_pylist():
            try:
                names.update(dataclasses.replace(self.labels, kind="class").names(value))
            except BadLabel:
                continue  # reading leaves the sample out
        return names

    def _check_columns(self, file: pq.ParquetFile, uri: str) -> None:
        for name in self.columns.values():
            if name.partition(".")[0] not in file.schema_arrow.names:
                raise UserError(
                    f"{uri} has no column {name.partition('.')[0]!r}, unlike the first file of the "
                    "source; pack files of one schema at a time."
                )

    def read(self, items: Iterable[File]) -> Iterator[Sample | Bad]:
        """Read the files' rows, some at a time."""
        for item in items:
            uri = self.uri(item)
            with storage.open_input(uri) as raw:
                file = _open(raw, uri)
                self._check_columns(file, uri)
                split = file_split(item.id, self.named_splits)
                for row in self._rows(file, uri, item):
                    if isinstance(row, Sample):
                        row = dataclasses.replace(row, split=split)
                    yield row

    def _rows(self, file: pq.ParquetFile, uri: str, item: File) -> Iterator[Sample | Bad]:
        names = [name.partition(".")[0] for name in self.columns.values()]
        start = 0
        for number in range(file.num_row_groups):
            row, group = start, file.metadata.row_group(number)
            start += group.num_rows
            try:
                for batch in file.iter_batches(
                    _batch_rows(group), row_groups=[number], columns=names, use_threads=False
                ):
                    for at in range(batch.num_rows):
                        yield self._sample(batch, at, f"{uri}#{row}", f"{item.id}#{row}")
                        row += 1
            except (pa.ArrowException, OSError) as error:
                # The other row groups may be whole.
                reason = f"parquet_damaged: row group {number} cannot be read ({_line(error)})"
                for lost in range(row, min(start, row + _MAX_LOST_ROWS)):
                    yield Bad.of(f"{uri}#{lost}", f"{item.id}#{lost}", reason)

    def _sample(self, batch: pa.RecordBatch, at: int, uri: str, name: str) -> Sample | Bad:
        given = _value(batch, self.id, at) if self.id else None
        sample_id = name if given in (None, "") else str(given)
        image = _value(batch, self.image, at)
        if not isinstance(image, bytes):
            # The Hugging Face struct may name a file instead; opening it could reach anywhere.
            return Bad.of(uri, sample_id, "no_image: the row has no image bytes")
        if len(image) > UNIT_BYTES:
            reason = f"too_large: it has {len(image)} bytes, more than {UNIT_BYTES}"
            return Bad.of(uri, sample_id, reason, image)
        column = self.labels.column
        raw = _value(batch, column, at) if column else None
        return read_labelled(self.labels, lambda: raw, uri, sample_id, image)


def open_parquet(source: str, request: Request) -> ParquetRows | None:
    """Look at the first file and say how all are read; None where it holds no image bytes.

    Raises:
        UserError: it cannot be read, or has not the columns that were asked for.
    """
    first = first_file(source, SUFFIXES)
    uri = storage.join(root_of(source, SUFFIXES), first.id)
    with storage.open_input(uri) as raw:
        file = _open(raw, uri)
        schema = file.schema_arrow
        image = image_column(schema, request)
        if not image:
            return None
        label = request.column("label", schema.names, LABEL_COLUMNS)
        values = first_values(file, label) if label else []
    labels = request.labels(label, values, class_names(schema, label))
    asked = request.column("id", schema.names, _ID_COLUMNS)
    text = asked and (request.id_column or _is_text(schema.field(asked).type))
    named = named_splits(file.id for file in list_files(source, SUFFIXES))
    return ParquetRows(source, labels, image, id=asked if text else "", named_splits=named)


def image_column(schema: pa.Schema, request: Request) -> str:
    """Return the column with image bytes: the one asked for, a usual one, or the only one."""
    found = {name: path for name in schema.names if (path := _bytes_path(schema.field(name)))}
    if request.image_column:
        asked = request.column("image", schema.names, ())
        return asked if "." in asked else found.get(asked, "")
    usual = request.column("image", list(found), _IMAGE_COLUMNS)
    only = next(iter(found)) if len(found) == 1 else ""
    return found.get(usual or only, "")


def _bytes_path(field: pa.Field) -> str:
    if _is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        inner = field.type.get_field_index("bytes")
        if inner >= 0 and _is_bytes(field.type.field(inner).type):
            return f"{field.name}.bytes"
    return ""


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def first_values(file: pq.ParquetFile, column: str) -> list[object]:
    """Return a column's values in the first rows."""
    names = [column.partition(".")[0]]
    batch = next(file.iter_batches(_FIRST_ROWS, columns=names, use_threads=False), None)
    return [] if batch is None else [_value(batch, column, at) for at in range(batch.num_rows)]


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the names that Hugging Face's metadata gives to a column's class numbers."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        feature = features[column]
        names = feature.get("names") or feature["feature"]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _batch_rows(group: Any) -> int:
    """Return how many rows of a row group are decoded at a time."""
    mean = group.total_byte_size // max(1, group.num_rows)
    rows: int = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, mean)))
    return rows


def _label_column(file: pq.ParquetFile, column: str) -> pa.ChunkedArray | None:
    if not column:
        return None
    head, *fields = column.split(".")
    try:
        values = file.read(columns=[head], use_threads=False)[head]
    except (pa.ArrowException, OSError):
        return None  # reading says which row
    for field in fields:
        values = pc.struct_field(values, field)
    return values


def _value(batch: pa.RecordBatch, path: str, at: int) -> Any:
    head, *fields = path.split(".")
    value = batch[head][at].as_py()
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return value


def _open(raw: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(raw, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{uri} is no Parquet file that can be read ({_line(error)}); mend it or move it away."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
