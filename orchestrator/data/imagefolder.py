"""What lies in an ImageFolder tree `root/<class>/<image>`: its classes, and its images in units.

A *unit* is what one packing task turns into shards. Units are cut while listing, so nobody ever
holds the list of a bucket. The same tree always gives the same units, on any cluster.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.stream import hash_key

# Classes that one lister deals into its units: enough that a shard mixes classes, few enough that a
# page of 1,000 names of each is 16 MB, and that a large tree has many listers.
_LISTER_CLASSES = 64
# Also cuts a unit. A packing task that writes to S3 holds some 3 times this at its peak (measured),
# so this bounds its memory whatever the images' size.
UNIT_BYTES = 128 << 20
# Requests in flight while looking into every class folder for a first file.
_PROBE_THREADS = 16


@dataclasses.dataclass(frozen=True)
class File:
    """One listed file."""

    id: str
    """Its path relative to the root, such as `cat/0123.jpg`."""
    size: int
    label: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """Files that are packed together, in packing order."""

    name: str
    files: tuple[File, ...]


def find_classes(source: str, say: Callable[[str], None]) -> list[str]:
    """Return the class folders of a tree, sorted; a class's place is its label.

    Raises:
        UserError: there is no tree, no class, or a class without files.
    """
    if not storage.is_s3(source) and not storage.local_path(source).is_dir():
        raise UserError(f"--source {source} is no folder; check the path.")
    folders, num_loose = _split_root(source)
    if not folders:
        found = f"{num_loose} files but no class folder" if num_loose else "nothing"
        raise UserError(
            f"--source {source} holds {found}, but images are expected as <class>/<image> below "
            "it; check the path."
        )
    _check_not_empty(source, folders)
    if num_loose:
        say(f"left out {num_loose} files directly in {source}: they are in no class folder")
    return folders


def _split_root(source: str) -> tuple[list[str], int]:
    folders, num_loose = [], 0
    for entry in storage.list_folder(source):
        if entry.is_folder and not _is_hidden(entry.name):
            folders.append(entry.name)
        num_loose += not entry.is_folder and not _is_hidden(entry.name)
    return sorted(folders), num_loose


def _check_not_empty(source: str, classes: Sequence[str]) -> None:
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        first = pool.map(lambda name: next(_files(source, name, 0), None), classes)
        empty = [name for name, file in zip(classes, first, strict=True) if file is None]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {storage.join(source, empty[0])}{more} holds no images, so the class "
            "could never be learned; remove the folder or restore its images."
        )


def num_listers(classes: Sequence[str]) -> int:
    """Return into how many groups of classes the listing is divided."""
    return -(-len(classes) // _LISTER_CLASSES)


def list_units(
    source: str, classes: Sequence[str], *, lister: int, max_images: int
) -> Iterator[Unit]:
    """Yield the units of one lister's classes, holding a page of each class at a time."""
    number, batch, batch_bytes = 0, list[File](), 0
    for file in _dealt(source, classes, lister):
        if batch and (len(batch) == max_images or batch_bytes + file.size > UNIT_BYTES):
            yield _unit(lister, number, batch)
            number, batch, batch_bytes = number + 1, [], 0
        batch.append(file)
        batch_bytes += min(file.size, UNIT_BYTES)
    if batch:
        yield _unit(lister, number, batch)


def _dealt(source: str, classes: Sequence[str], lister: int) -> Iterator[File]:
    # One file of each class in turn: training shuffles only some 16 chunks together, so a shard
    # that held one class would make batches of few classes.
    step = num_listers(classes)
    labels = range(lister, len(classes), step)
    queue = collections.deque(_files(source, classes[label], label) for label in labels)
    while queue:
        files = queue.popleft()
        file = next(files, None)
        if file is not None:
            yield file
            queue.append(files)


def _files(source: str, class_name: str, label: int) -> Iterator[File]:
    for entry in storage.list_tree(storage.join(source, class_name)):
        if not any(_is_hidden(part) for part in entry.name.split("/")):
            yield File(f"{class_name}/{entry.name}", entry.size, label)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")  # .DS_Store and the like


def _unit(lister: int, number: int, files: list[File]) -> Unit:
    ordered = sorted(files, key=lambda file: (hash_key("unit", encode_id(file.id)), file.id))
    return Unit(f"{lister:05d}-{number:06d}", tuple(ordered))


def encode_id(sample_id: str) -> bytes:
    """Return an id's bytes, also where a local file's name is not UTF-8."""
    return os.fsencode(sample_id)
