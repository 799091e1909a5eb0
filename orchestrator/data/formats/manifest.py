"""Tables of `uri, label[, id, checksum]` as CSV, JSONL or Parquet; the images lie elsewhere.

Every row is checked before anything is packed, so a row that may not be read stops the pack early.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.allow import Allowed
from orchestrator.data.formats.base import Bad, Sample, Survey, printable, read_labelled
from orchestrator.data.formats.files import first_file, list_files, root_of
from orchestrator.data.formats.labels import BadLabel, Labels
from orchestrator.data.formats.reading import read_ahead, read_image
from orchestrator.data.formats.request import LABEL_COLUMNS, Request
from orchestrator.data.formats.sequential import Sequential

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_URI_COLUMNS = ("uri", "url", "path", "image", "file", "file_name", "filename", "image_path")
_ID_COLUMNS = ("id", "key", "image_id")
_CHECKSUM_COLUMNS = ("checksum", "sha256", "md5", "xxh3_64")
_HASHES: dict[int, tuple[str, Callable[[bytes], str]]] = {
    16: ("xxh3_64", lambda image: str(xxhash.xxh3_64_hexdigest(image))),
    32: ("md5", lambda image: hashlib.md5(image, usedforsecurity=False).hexdigest()),
    64: ("sha256", lambda image: hashlib.sha256(image).hexdigest()),
}
_FIRST_ROWS = 1000
_BATCH_ROWS = 4096
_MAX_LINE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a manifest."""

    id: str
    uri: str
    label: Any
    checksum: str = ""
    size: int = 0

    @property
    def stamp(self) -> str:
        """What the row says besides its id."""
        return f"{self.uri} {self.label!r} {self.checksum}"


@dataclasses.dataclass(frozen=True)
class Manifests:
    """A manifest, or a folder of them with the same columns."""

    source: str
    labels: Labels
    allowed: Allowed
    uri: str
    """Column of the URIs; `id` and `checksum` may be empty."""
    id: str = ""
    checksum: str = ""
    parts: int = 1
    named_splits: tuple[str, ...] = ()
    needs_survey: bool = True
    mixes: int = 32
    """Manifests are often sorted by class."""

    def with_labels(self, labels: Labels) -> "Manifests":
        """Return the format with its labels read so."""
        return dataclasses.replace(self, labels=labels)

    def items(self, part: int) -> Iterator[Row]:
        """List the rows of all manifests."""
        for file in list_files(self.source, SUFFIXES):
            location = storage.join(root_of(self.source, SUFFIXES), file.id)
            folder = location.rpartition("/")[0]
            for number, row in enumerate(read_rows(location), start=1):
                yield self._row(row, f"{location} row {number}", folder)

    def _row(self, row: dict[str, Any], where: str, folder: str) -> Row:
        uri = row.get(self.uri)
        if not isinstance(uri, str) or not uri.strip():
            raise UserError(
                f"{where} has nothing in column {self.uri!r}; name the column of the URIs with "
                "--image-column, or mend the row."
            )
        given = row.get(self.id) if self.id else None
        label = row.get(self.labels.column) if self.labels.column else None
        return Row(
            id=uri.strip() if given in (None, "") else str(given),
            uri=self.allowed.resolve(uri.strip(), where, folder),
            label=tuple(label) if isinstance(label, list) else label,
            checksum=str(row.get(self.checksum) or "") if self.checksum else "",
        )

    def survey(self, items: Iterable[Row]) -> Survey:
        """Collect the class names; listing has checked the URIs."""
        found = Survey()
        for row in items:
            try:
                found.names.update(self.labels.names(row.label))
            except BadLabel:
                continue  # reading leaves the sample out
        return found

    def read(self, items: Iterable[Row]) -> Iterator[Sample | Bad]:
        """Read the images that rows name, some requests ahead."""
        for row, image in read_ahead(items, self._read):
            yield image if isinstance(image, Bad) else self._sample(row, image)

    def _read(self, row: Row) -> bytes | Bad:
        if not self.allowed.check_links(row.uri):
            return Bad.of(row.uri, row.id, "outside: it links to a file outside what --allow names")
        return read_image(row.uri, row.id, None)

    def _sample(self, row: Row, image: bytes) -> Sample | Bad:
        if row.checksum and (reason := _checksum_error(row.checksum, image)):
            return Bad.of(row.uri, row.id, reason, image)
        return read_labelled(self.labels, lambda: row.label, row.uri, row.id, image)


def _checksum_error(stated: str, image: bytes) -> str:
    digits = stated.rpartition(":")[2].strip().lower()
    if len(digits) not in _HASHES:
        return f"checksum: {stated[:80]!a} is no xxh3_64, md5 or sha256 in hexadecimal digits"
    name, compute = _HASHES[len(digits)]
    found = compute(image)
    return "" if found == digits else f"checksum: {name} is {found}, not {digits}"


def open_manifests(source: str, request: Request) -> Manifests:
    """Look at the first rows and say how all are read.

    Raises:
        UserError: there is no column of URIs, or one that was asked for is missing.
    """
    first = first_file(source, SUFFIXES)
    root = root_of(source, SUFFIXES)
    location = storage.join(root, first.id)
    rows = [row for row, _ in zip(read_rows(location), range(_FIRST_ROWS), strict=False)]
    if not rows:
        raise UserError(f"{location} is a manifest without rows; mend it or check --source.")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    uri = request.column("image", columns, _URI_COLUMNS)
    if not uri:
        raise UserError(
            f"{location} has no column {', '.join(_URI_COLUMNS[:3])} or the like, only "
            f"{', '.join(map(ascii, columns))}; name the URIs' column with --image-column."
        )
    label = request.column("label", columns, LABEL_COLUMNS)
    return Manifests(
        source,
        request.labels(label, [row.get(label) for row in rows] if label else []),
        Allowed.below(request.allow, root),
        uri,
        id=request.column("id", columns, _ID_COLUMNS),
        checksum=next((name for name in _CHECKSUM_COLUMNS if name in columns), ""),
    )


def read_rows(location: str) -> Iterator[dict[str, Any]]:
    """Yield a manifest's rows by column name.

    Raises:
        UserError: it is damaged, with the row.
    """
    number = 0
    read = _READERS[location.rpartition(".")[2].lower()]
    rows = read(location)
    while True:
        try:
            row = next(rows, None)
        except (ValueError, OSError, csv.Error, pa.ArrowException, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{location} cannot be read after row {number} ({printable(str(error))[:200]}); "
                "mend it there."
            ) from error
        if row is None:
            return
        number += 1
        yield row


def _read_csv(location: str, delimiter: str = ",") -> Iterator[dict[str, Any]]:
    with _text(location) as text:
        reader = csv.DictReader(_lines(text), delimiter=delimiter, strict=True)
        for row in reader:
            if None in row:
                raise csv.Error(f"it has more than {len(reader.fieldnames or ())} fields")
            yield row


def _read_json_lines(location: str) -> Iterator[dict[str, Any]]:
    with _text(location) as text:
        for line in _lines(text):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line is no JSON object")
                yield row


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(_MAX_LINE_BYTES):
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(f"a line has more than {_MAX_LINE_BYTES} characters")
        yield line


def _read_parquet(location: str) -> Iterator[dict[str, Any]]:
    with storage.open_input(location) as raw:
        for batch in pq.ParquetFile(raw).iter_batches(_BATCH_ROWS, use_threads=False):
            yield from batch.to_pylist()


def _text(location: str) -> io.TextIOWrapper:
    buffered = io.BufferedReader(Sequential(location), 1 << 20)
    return io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="")


_READERS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    "csv": _read_csv,
    "tsv": lambda location: _read_csv(location, "\t"),
    "jsonl": _read_json_lines,
    "ndjson": _read_json_lines,
    "parquet": _read_parquet,
}
