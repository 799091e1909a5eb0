"""WebDataset: tars whose members `key.jpg`, `key.cls`, `key.json`, `key.txt` are one sample.

img2dataset writes the same, with captions in `key.txt` and Parquet tables beside the tars, which
are ignored. A tar is read once, forwards; members that are not needed are skipped.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.base import (
    UNIT_BYTES,
    Bad,
    File,
    Sample,
    Survey,
    encode_id,
    read_labelled,
)
from orchestrator.data.formats.files import (
    file_split,
    first_file,
    list_files,
    named_splits,
    root_of,
)
from orchestrator.data.formats.labels import BadLabel, Labels
from orchestrator.data.formats.request import LABEL_COLUMNS, Request
from orchestrator.data.formats.sequential import Sequential
from orchestrator.data.formats.tar import BadTar, Member, members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
SUFFIXES = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
# Of a member that holds a label; more is no label.
_MAX_LABEL_BYTES = 1 << 20
# Samples that decide what the labels are.
_FIRST_SAMPLES = 100


@dataclasses.dataclass
class _Group:
    """The members of one key that matter."""

    key: str
    uri: str
    image: bytes | None = None
    fields: dict[str, bytes] = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class TarShards:
    """A folder of tars, or one tar."""

    source: str
    labels: Labels
    image: str = ""
    """Extension of the image; empty: the first member that looks like one."""
    named_splits: tuple[str, ...] = ()
    parts: int = 1
    mixes: int = 0

    @property
    def needs_survey(self) -> bool:
        """Only names must be known before the first label is written."""
        return self.labels.named and not self.labels.fixed

    def with_labels(self, labels: Labels) -> "TarShards":
        """Return the format with its labels read so."""
        return dataclasses.replace(self, labels=labels)

    def items(self, part: int) -> Iterator[File]:
        """List the tars."""
        return list_files(self.source, SUFFIXES)

    def survey(self, items: Iterable[File]) -> Survey:
        """Collect the class names: reads every tar, but of its images nothing on local disks."""
        found = Survey()
        for item in items:
            for group in self._groups(item, images=False):
                if isinstance(group, _Group):
                    try:
                        found.merge(Survey(names=set(self.labels.names(self._raw(group)))))
                    except BadLabel:
                        continue  # reading leaves the sample out
        return found

    def read(self, items: Iterable[File]) -> Iterator[Sample | Bad]:
        """Read the tars' samples."""
        for item in items:
            for group in self._groups(item, images=True):
                yield group if isinstance(group, Bad) else self._sample(item, group)

    def _sample(self, item: File, group: _Group) -> Sample | Bad:
        sample_id = f"{item.id}/{group.key}"
        image = group.image
        if group.reason or image is None:
            reason = group.reason or "no_image: no member of this key is an image"
            return Bad.of(group.uri, sample_id, reason)
        split = file_split(item.id, self.named_splits)
        raw = functools.partial(self._raw, group)
        return read_labelled(self.labels, raw, group.uri, sample_id, image, split)

    def _raw(self, group: _Group) -> object:
        member, _, field = self.labels.column.partition(":")
        if not member:
            return None
        if member not in group.fields:
            raise BadLabel(f"no_label: there is no {group.key}.{member}")
        text = group.fields[member].decode("utf-8", "surrogateescape").strip()
        if not field:
            return text
        try:
            return json.loads(text).get(field)
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadLabel(f"bad_label: {group.key}.{member} is no JSON object") from error

    def _groups(self, item: File, *, images: bool) -> Iterator[_Group | Bad]:
        uri = storage.join(root_of(self.source, SUFFIXES), item.id)
        label = self.labels.column.partition(":")[0]
        reading = _Reading(item, uri, {label} - {""}, self.image, images=images)
        with Sequential(uri) as stream:
            try:
                yield from reading.groups(stream)
            except BadTar as error:
                yield from reading.rest()
                yield Bad.of(uri, f"{item.id}/", error)


class _Reading:
    """One pass over one tar."""

    def __init__(self, item: File, uri: str, labels: set[str], image: str, *, images: bool) -> None:
        self._item, self._uri = item, uri
        self._labels, self._image, self._images = labels, image, images
        self._group: _Group | None = None
        self._keys = set[int]()

    def groups(self, stream: Sequential) -> Iterator[_Group | Bad]:
        """Yield each key's members together."""
        for member in members(stream, self._item.size):
            if member.kind == "other":
                reason = f"not_a_file: it is a {member.what}"
                where = f"{self._uri}#{member.name}"
                yield Bad.of(where, f"{self._item.id}/{member.name}", reason)
            key, extension = split_name(member.name)
            if member.kind != "file" or not extension:
                continue
            if self._group is None or self._group.key != key:
                yield from self.rest()
                self._group = self._started(key)
            self._take(stream, member, extension, self._group)
        yield from self.rest()

    def rest(self) -> Iterator[_Group]:
        """Yield the members of the last key."""
        if self._group is not None:
            yield self._group
        self._group = None

    def _started(self, key: str) -> _Group:
        group = _Group(key, f"{self._uri}#{key}")
        known = xxhash.xxh3_64_intdigest(encode_id(key))
        if known in self._keys:
            group.reason = "duplicate: an earlier sample of this tar has the same key"
        self._keys.add(known)
        return group

    def _take(self, stream: Sequential, member: Member, extension: str, group: _Group) -> None:
        if extension in self._labels and member.size <= _MAX_LABEL_BYTES:
            group.fields[extension] = stream.read_exactly(member.size)
            return
        is_image = extension == self._image if self._image else extension in IMAGE_EXTENSIONS
        if not is_image or not self._images or group.image is not None:
            return
        if member.size > UNIT_BYTES:
            group.reason = f"too_large: it has {member.size} bytes, more than {UNIT_BYTES}"
        else:
            group.image = stream.read_exactly(member.size)


def split_name(name: str) -> tuple[str, str]:
    """Return key and extension: `a/b.left.png` is ("a/b", "left.png"); hidden files have none."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem else ("", "")


def open_tars(source: str, request: Request) -> TarShards:
    """Look at the first samples of the first tar and say how all are read.

    Raises:
        UserError: there is no tar, or none that can be read.
    """
    _refuse_compressed(source)
    first = first_file(source, SUFFIXES)
    asked, _, field = request.label_column.partition(":")
    probe = TarShards(source, Labels("none"))
    found, bad = _first_groups(probe, first, {asked} - {""} or {"cls", "json"})
    if not found:
        raise UserError(
            f"the tar {storage.join(root_of(source, SUFFIXES), first.id)} holds no sample "
            f"({bad or 'it is empty'}); mend it, or check --source."
        )
    column, values = _label_values(found, asked, field)
    image = request.image_column.lower().removeprefix(".")
    named = named_splits(file.id for file in list_files(source, SUFFIXES))
    return TarShards(source, request.labels(column, values), image, named)


def _refuse_compressed(source: str) -> None:
    first = next(list_files(source, COMPRESSED), None)
    if first is not None:
        raise UserError(
            f"{storage.join(root_of(source, COMPRESSED), first.id)} is a compressed tar, whose "
            "members cannot be read by offset; decompress it (images gain nothing from it)."
        )


def _first_groups(probe: TarShards, first: File, wanted: set[str]) -> tuple[list[_Group], str]:
    uri = storage.join(root_of(probe.source, SUFFIXES), first.id)
    groups, bad = list[_Group](), ""
    with Sequential(uri) as stream:
        reading = _Reading(first, uri, wanted, "", images=False)
        try:
            for group in itertools.islice(reading.groups(stream), _FIRST_SAMPLES):
                if isinstance(group, _Group):
                    groups.append(group)
                else:
                    bad = group.reason
        except BadTar as error:
            bad = str(error)
            groups += reading.rest()
    return groups, bad


def _label_values(groups: list[_Group], asked: str, field: str) -> tuple[str, list[object]]:
    """Return where the labels lie and those of the first samples: `cls`, else a field of `json`."""
    name = asked or "cls"
    if name != "json" and (texts := [g.fields[name] for g in groups if name in g.fields]):
        return name, [text.decode("utf-8", "surrogateescape").strip() for text in texts]
    if asked and asked != "json":
        raise UserError(
            f"--label-column {asked} is no member of the first samples; write an extension such "
            "as cls or txt, or json:FIELD."
        )
    objects = [value for group in groups if isinstance(value := _json(group), dict)]
    for column in [field] if field else LABEL_COLUMNS:
        values = [value[column] for value in objects if column in value]
        if values:
            return f"json:{column}", values
    return "", []


def _json(group: _Group) -> Any:
    try:
        return json.loads(group.fields.get("json", b"null"))
    except (ValueError, RecursionError):
        return None
