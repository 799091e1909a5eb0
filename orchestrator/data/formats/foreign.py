"""MosaicML MDS and LitData, read through their own packages where they are installed.

Thin on purpose: what the package returns for a sample is a mapping of columns, as in a manifest.
"""

import dataclasses
import importlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.base import Bad, Sample, Survey, read_labelled
from orchestrator.data.formats.labels import BadLabel, Labels
from orchestrator.data.formats.request import LABEL_COLUMNS, Request

_PACKAGES = {"mds": ("streaming", "mosaicml-streaming"), "litdata": ("litdata", "litdata")}
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "x", "bytes")
_FIRST_SAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Rows:
    """Consecutive samples of one shard."""

    id: str
    size: int
    start: int
    stop: int

    @property
    def stamp(self) -> str:
        """Samples and size, not the place: shards before it may be added or removed."""
        return f"{self.stop - self.start} {self.size}"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A data set that another package wrote."""

    format: str
    source: str
    labels: Labels
    image: str
    id: str = ""
    parts: int = 1
    named_splits: tuple[str, ...] = ()
    mixes: int = 0

    @property
    def needs_survey(self) -> bool:
        """Only names must be known before the first label is written."""
        return self.labels.named and not self.labels.fixed

    def with_labels(self, labels: Labels) -> "Foreign":
        """Return the format with its labels read so."""
        return dataclasses.replace(self, labels=labels)

    def items(self, part: int) -> Iterator[Rows]:
        """List the shards, as the index of the data set names them."""
        return list_shards(self.format, self.source)

    def survey(self, items: Iterable[Rows]) -> Survey:
        """Collect the class names."""
        found = Survey()
        for item in items:
            for _, row in read_rows(self.format, self.source, item):
                if isinstance(row, str):
                    continue
                try:
                    found.names.update(self.labels.names(row.get(self.labels.column)))
                except BadLabel:
                    continue  # reading leaves the sample out
        return found

    def read(self, items: Iterable[Rows]) -> Iterator[Sample | Bad]:
        """Read samples by number."""
        for item in items:
            for number, row in read_rows(self.format, self.source, item):
                yield self._sample(f"{item.id}#{number - item.start}", row)

    def _sample(self, name: str, row: Mapping[str, Any] | str) -> Sample | Bad:
        uri = storage.join(self.source, name)
        if isinstance(row, str):
            return Bad.of(uri, name, row)
        sample_id = str(row[self.id]) if self.id else name
        image = _bytes(row.get(self.image))
        if image is None:
            return Bad.of(uri, sample_id, "no_image: the sample has no image")
        raw = _plain(row.get(self.labels.column)) if self.labels.column else None
        return read_labelled(self.labels, lambda: raw, uri, sample_id, image)


def recognise(source: str) -> str:
    """Return which package wrote a source, by its `index.json`, or nothing."""
    location = storage.join(source, "index.json")
    if not storage.exists(location):
        return ""
    content = _index(source)
    if "chunks" in content:
        return "litdata"
    shards = content.get("shards")
    mds = isinstance(shards, list) and shards and shards[0].get("format") == "mds"
    return "mds" if mds else ""


def _index(source: str) -> dict[str, Any]:
    location = storage.join(source, "index.json")
    try:
        content = json.loads(storage.read_bytes(location))
        return content if isinstance(content, dict) else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is no JSON ({error}); mend it or move it away.") from error


def list_shards(name: str, source: str) -> Iterator[Rows]:
    """Yield each shard of a data set with the numbers of its samples.

    Raises:
        UserError: its index is damaged, or its samples hold Python objects.
    """
    start = 0
    try:
        content = _index(source)
        _refuse_pickles(content, source)
        for shard in content["shards" if name == "mds" else "chunks"]:
            count = int(shard["samples"] if name == "mds" else shard["chunk_size"])
            data = shard.get("raw_data", {})
            size = int(data["bytes"] if name == "mds" else shard["chunk_bytes"])
            where = str(data["basename"] if name == "mds" else shard["filename"])
            if where.startswith("/") or {"", ".", ".."} & set(where.split("/")):
                raise ValueError(f"{where} is no name of a shard")
            yield Rows(where, size, start, start + count)
            start += count
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source}/index.json is damaged ({error!r}); write it again.") from error


def _refuse_pickles(content: Mapping[str, Any], source: str) -> None:
    """Refuse a column whose reading would run whatever code its writer put there."""
    config = content.get("config") or {}
    formats = [*(shard.get("column_encodings") or () for shard in content.get("shards") or ())]
    kinds = {str(kind) for shard in formats for kind in shard}
    kinds |= {str(kind).partition(":")[0] for kind in config.get("data_format") or ()}
    if kinds & {"pkl", "pickle"}:
        raise UserError(
            f"{source} has a column of Python pickles, which can run any code when they are read; "
            "write it again with encoded images and plain labels."
        )


def read_rows(name: str, source: str, rows: Rows) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yield samples by number, as columns, copying their shard to a temporary folder first.

    In place of a sample that cannot be read comes the reason.
    """
    package = _package(name)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        remote = source if storage.is_remote(source) else None
        if name == "mds":
            local = folder if remote else source
            opened = (
                package.LocalDataset(local)
                if remote is None
                else package.StreamingDataset(
                    remote=remote, local=folder, shuffle=False, batch_size=1
                )
            )
        else:
            opened = package.StreamingDataset(source, shuffle=False, cache_dir=folder)
        for number in range(rows.start, rows.stop):
            yield number, _row_of(opened, number)


def _row_of(opened: Any, number: int) -> Mapping[str, Any] | str:
    try:
        row = opened[number]
    except Exception as error:  # whatever the package's decoders raise for a damaged sample
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"damaged: it cannot be read ({text})"
    return row if isinstance(row, Mapping) else {"x": row}


def open_foreign(name: str, source: str, request: Request) -> Foreign:
    """Look at the first samples and say how all are read.

    Raises:
        UserError: the package is not installed, or there is no image.
    """
    first = next(list_shards(name, source), None)
    if first is None:
        raise UserError(f"{source} is a {name} data set without samples; check --source.")
    head = dataclasses.replace(first, stop=min(first.stop, first.start + _FIRST_SAMPLES))
    found = [row for _, row in read_rows(name, source, head)]
    rows = [row for row in found if not isinstance(row, str)]
    if not rows:
        raise UserError(f"{source}: none of the first samples can be read ({found[0]}); mend it.")
    columns = list(rows[0])
    image = request.column("image", columns, _IMAGE_COLUMNS)
    if not image:
        raise UserError(
            f"{source} has none of the usual image columns, only {', '.join(columns)}; name it "
            "with --image-column."
        )
    label = request.column("label", columns, LABEL_COLUMNS)
    values = [_plain(row.get(label)) for row in rows] if label else []
    identity = request.column("id", columns, ("id", "key"))
    return Foreign(name, source, request.labels(label, values), image, identity)


def _package(name: str) -> Any:
    module, package = _PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"reading {name} needs the package {package}; install it with "
            f"`pip install 'orchestrator[{name}]'`."
        ) from error


def _bytes(value: Any) -> bytes | None:
    """Return encoded bytes: those that were stored, or a PNG of pixels that the package decoded."""
    if isinstance(value, bytes):
        return value
    stored = getattr(value, "fp", None)  # a Pillow image that is not decoded yet
    if stored is not None:
        stored.seek(0)
        return bytes(stored.read())
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        return None
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels).squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
