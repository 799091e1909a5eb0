"""An ImageFolder tree `root/<class>/<image>`: its classes, and its images.

Images are listed by many listers, each some classes or a range of names in a few huge classes, so
nobody ever holds the list of a bucket. The same tree always gives the same list, on any cluster.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.base import Bad, File, Sample, Survey, is_hidden
from orchestrator.data.formats.labels import Labels
from orchestrator.data.formats.reading import read_ahead, read_image

# Classes that one lister deals: enough that a shard mixes classes, few enough that a page of 1,000
# names of each is 16 MB, and that a large tree has many listers.
_LISTER_CLASSES = 64
# Requests in flight while looking into every class folder for a first file.
_PROBE_THREADS = 16
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Classes of a bucket are cut into ranges where there are at most so many, into so many in all: a
# lister reads some 10,000 names a second, which feeds ten packing tasks.
_CUT_CLASSES = 32
_CUT_RANGES = 64
_HUGE_CLASS = 20_000
_MAX_PREFIX = 64


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A tree of class folders."""

    source: str
    labels: Labels
    cuts: tuple[tuple[str, ...], ...] = ()
    """For each class, names that cut it into ranges which are listed side by side; or nothing."""
    needs_survey: bool = False
    named_splits: tuple[str, ...] = ()
    mixes: int = 1

    @property
    def parts(self) -> int:
        """Groups of classes, times the most ranges that a class is cut into."""
        return num_groups(self.labels.classes) * self._ranges

    @property
    def _ranges(self) -> int:
        return 1 + max(map(len, self.cuts), default=0)

    def with_labels(self, labels: Labels) -> "ImageFolder":
        """Return the format with its labels read so."""
        return dataclasses.replace(self, labels=labels)

    def items(self, part: int) -> Iterator[File]:
        """List one file of each class of a part in turn.

        Training shuffles only some 16 chunks together, so a shard that held one class would make
        batches of few classes.
        """
        group, number = divmod(part, self._ranges)
        first = group * _LISTER_CLASSES
        labels = range(first, min(first + _LISTER_CLASSES, len(self.labels.classes)))
        queue = collections.deque(self._files(label, number) for label in labels)
        while queue:
            files = queue.popleft()
            file = next(files, None)
            if file is not None:
                yield file
                queue.append(files)

    def _files(self, label: int, number: int) -> Iterator[File]:
        name = self.labels.classes[label]
        cuts = self.cuts[label] if label < len(self.cuts) else ()
        if number > len(cuts):
            return
        after = cuts[number - 1] if number else ""
        until = cuts[number] if number < len(cuts) else ""
        folder = storage.join(self.source, name)
        for entry in storage.list_tree(folder, after=after):
            if until and entry.name > until:
                return
            if not is_hidden(entry.name):
                yield File(f"{name}/{entry.name}", entry.size, label, entry.etag)

    def survey(self, items: Iterable[File]) -> Survey:
        """Return nothing: the folders have said it all."""
        return Survey()

    def read(self, items: Iterable[File]) -> Iterator[Sample | Bad]:
        """Read the images, some requests ahead."""
        for file, image in read_ahead(items, self._read):
            uri = storage.join(self.source, file.id)
            yield image if isinstance(image, Bad) else Sample(file.id, uri, file.label, image)

    def _read(self, file: File) -> bytes | Bad:
        return read_image(storage.join(self.source, file.id), file.id, file.size)


def open_folder(
    source: str, say: Callable[[str], None], *, known: Sequence[str] = ()
) -> ImageFolder:
    """Find the classes of a tree.

    Args:
        source: the tree.
        say: receives what is left out.
        known: classes that were packed before and keep their numbers; new ones follow.

    Raises:
        UserError: there is no tree, no class, or a class without files.
    """
    found = find_classes(source, say)
    classes = (*known, *(name for name in found if name not in set(known)))
    return ImageFolder(source, Labels("class", named=True, classes=classes, fixed=True))


def with_cuts(tree: ImageFolder) -> ImageFolder:
    """Return the tree with its huge classes cut into ranges, where they are few.

    A local folder comes whole from the system, so only buckets are cut.
    """
    classes = tree.labels.classes
    if not storage.is_remote(tree.source) or len(classes) > _CUT_CLASSES:
        return tree
    wanted = -(-_CUT_RANGES // len(classes))
    folders = [storage.join(tree.source, name) for name in classes]
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        cuts = tuple(pool.map(lambda folder: find_cuts(folder, wanted), folders))
    return dataclasses.replace(tree, cuts=cuts if any(cuts) else ())


def find_cuts(folder: str, wanted: int, *, huge: int = _HUGE_CLASS) -> tuple[str, ...]:
    """Return at least `wanted - 1` names that cut a folder's listing, if it has `huge` files.

    Prefixes are lengthened by a character until there are enough; about a request for each.
    """
    probe = itertools.islice(storage.list_tree(folder), huge)
    if wanted < 2 or sum(1 for _ in probe) < huge:
        return ()
    prefixes = [""]
    while len(prefixes) < wanted:
        longer = [child for prefix in prefixes for child in _children(folder, prefix)]
        if not longer or longer == prefixes or len(longer[0]) > _MAX_PREFIX:
            break
        prefixes = longer
    return tuple(prefixes[1:])


def _children(folder: str, prefix: str) -> list[str]:
    """Return the prefixes one character longer that names of the folder begin with."""
    found, after = list[str](), prefix
    while True:
        entry = next(storage.list_tree(folder, after=after), None)
        if entry is None or not entry.name.startswith(prefix):
            return found
        found.append(entry.name[: len(prefix) + 1])
        after = f"{found[-1]}\U0010ffff"


def num_groups(classes: Sequence[str]) -> int:
    """Return into how many groups of consecutive classes the listing is divided."""
    return -(-len(classes) // _LISTER_CLASSES)


def find_classes(source: str, say: Callable[[str], None]) -> list[str]:
    """Return the class folders of a tree, sorted; a class's place is its label.

    Raises:
        UserError: there is no tree, no class, or a class without files.
    """
    if not storage.is_remote(source) and not storage.local_path(source).is_dir():
        raise UserError(f"--source {source} is no folder; check the path.")
    folders, num_loose = _split_root(source)
    if "" in folders:  # listing it would list the whole source again
        folders.remove("")
        say(f"left out what lies below {source.rstrip('/')}//: its class would have no name")
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
        if entry.is_folder and not is_hidden(entry.name):
            folders.append(entry.name)
        num_loose += not entry.is_folder and not is_hidden(entry.name)
    return sorted(folders), num_loose


def _check_not_empty(source: str, classes: Sequence[str]) -> None:
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        found = list(pool.map(lambda name: _has_files(storage.join(source, name)), classes))
        empty = [name for name, has_files in zip(classes, found, strict=True) if not has_files]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"class folder {storage.join(source, empty[0])}{more} holds no images, so the class "
            "could never be learned; remove the folder or restore its images."
        )


def _has_files(folder: str) -> bool:
    return any(not is_hidden(entry.name) for entry in storage.list_tree(folder))
