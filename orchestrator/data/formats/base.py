"""What every layout of images offers to packing: listing, a first look, reading. Pure.

A *format* is a frozen dataclass that knows one source. Listers ask it for *items* (a file, a tar, a
manifest's row), which are cut into *units*; a packing task reads a unit's items as *samples*.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from orchestrator.config import UserError
from orchestrator.data.formats.labels import MAX_CLASSES, BadLabel, Label, Labels

# Cuts a unit and a shard, and is the most bytes of one image. A packing task that writes to S3
# holds some 3 times this at its peak (measured), so this bounds its memory whatever the images.
UNIT_BYTES = 128 << 20
# First bytes of a bad sample that quarantine.parquet keeps.
FIRST_BYTES = 16


class Item(Protocol):
    """The smallest thing that is listed, packed and recognised when the source has grown."""

    @property
    def id(self) -> str:
        """What it is called, relative to the source."""

    @property
    def size(self) -> int:
        """Bytes, or 0 where listing does not tell."""

    @property
    def stamp(self) -> str:
        """Changes when its content or label does, as far as listing tells."""


@dataclasses.dataclass(frozen=True)
class File:
    """One listed file: an image of a class, or a container of many."""

    id: str
    """Its path relative to the source, such as `cat/0123.jpg`."""
    size: int
    label: int = -1
    etag: str = ""

    @property
    def stamp(self) -> str:
        """Size, label and, where the storage says one, the entity tag."""
        return f"{self.size} {self.label} {self.etag}"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Items that are packed together, in packing order."""

    name: str
    items: tuple[Any, ...]

    @property
    def weight(self) -> int:
        """Bytes of its items as listed; where listing does not tell, their number."""
        return sum(item.size for item in self.items) or len(self.items)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One encoded image as the source has it."""

    id: str
    uri: str
    label: Label
    image: bytes
    split: str = ""
    """val or test where the source says so; empty: by the id."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """A sample that is left out: one row of `quarantine.parquet`."""

    uri: str
    id: str
    reason: str
    first_bytes: str = ""
    """At most 16 bytes, as hexadecimal digits."""
    epoch: int = 0

    @classmethod
    def of(cls, uri: str, sample_id: str, reason: object, image: bytes | memoryview = b"") -> "Bad":
        """Describe a sample, with names that are not UTF-8 spelled out."""
        first = image[:FIRST_BYTES].hex()
        return cls(printable(uri), printable(sample_id), printable(str(reason)), first)


@dataclasses.dataclass
class Survey:
    """What a first look at items found; sums up over tasks."""

    names: set[str] = dataclasses.field(default_factory=set)
    """Labels that are names."""
    weight: int = 0
    """As `Unit.weight`."""
    files: pa.Table | None = None
    """Parquet files as the index would name them, where they may be indexed in place."""

    def merge(self, other: "Survey") -> None:
        """Add what another task found.

        Raises:
            UserError: there are more names than any label set has.
        """
        self.names |= other.names
        if len(self.names) > MAX_CLASSES:
            raise UserError(
                f"the labels hold more than {MAX_CLASSES:,} different texts, which are no classes; "
                "name another --label-column, or use --label-kind none."
            )
        self.weight += other.weight
        if other.files is not None:
            tables = [other.files] if self.files is None else [self.files, other.files]
            self.files = pa.concat_tables(tables)


class Format(Protocol):
    """One source in one layout; pickled into every task."""

    @property
    def labels(self) -> Labels:
        """How a label is read."""

    @property
    def needs_survey(self) -> bool:
        """Whether every item must be looked at before the first is packed."""

    @property
    def parts(self) -> int:
        """Listers that work side by side. The same source always has the same."""

    @property
    def named_splits(self) -> tuple[str, ...]:
        """Splits that folder or file names of the source fill: some of val and test."""

    @property
    def mixes(self) -> int:
        """Units' worth of items that are shuffled before they are cut into units."""

    def with_labels(self, labels: Labels) -> "Format":
        """Return the format with its labels read so."""

    def items(self, part: int) -> Iterator[Any]:
        """List the items of one part, in an order that does not change.

        Raises:
            UserError: something in the source may not be packed.
        """

    def survey(self, items: Iterable[Any]) -> Survey:
        """Look at items without packing them."""

    def read(self, items: Iterable[Any]) -> Iterator[Sample | Bad]:
        """Read items' samples, in order, holding a few images at a time."""


def read_labelled(
    labels: Labels,
    raw: Callable[[], object],
    uri: str,
    sample_id: str,
    image: bytes,
    split: str = "",
) -> Sample | Bad:
    """Return a sample with its label, or why it is left out.

    Raises:
        UserError: the label is none of the classes that the user listed.
    """
    try:
        return Sample(sample_id, uri, labels.parse(raw()), image, split)
    except BadLabel as error:
        return Bad.of(uri, sample_id, error, image)
    except UserError as error:
        raise UserError(f"{printable(uri)}: {error}") from error


def encode_id(sample_id: str) -> bytes:
    """Return an id's bytes, also where a local file's name is not UTF-8."""
    return os.fsencode(sample_id)


def printable(text: str) -> str:
    """Return a text that is UTF-8: other bytes of a name are spelled out."""
    return encode_id(text).decode(errors="backslashreplace")


def is_hidden(path: str) -> bool:
    """Return whether a part of a path is `.DS_Store` and the like."""
    return any(part.startswith(".") for part in path.split("/"))
