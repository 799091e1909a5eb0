"""Containers of images (tars, Parquet files, manifests) below a source, or the source itself."""

import re
from collections.abc import Collection, Iterable, Iterator

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.base import File, is_hidden

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
}
_SPLIT_WORD = re.compile(rf"({'|'.join(_SPLITS)})(?=$|[-_./0-9])", re.IGNORECASE)


def root_of(source: str, suffixes: tuple[str, ...]) -> str:
    """Return the folder that names are relative to: the source, or where its one file lies."""
    return source.rpartition("/")[0] if is_container(source, suffixes) else source


def is_container(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name ends in one of the suffixes, in any case."""
    return name.lower().endswith(suffixes)


def list_files(source: str, suffixes: tuple[str, ...]) -> Iterator[File]:
    """Yield the source's containers by name; hidden ones and other files are left out.

    Raises:
        UserError: a key of a bucket has an empty part (`//`), so that no path names it.
    """
    if is_container(source, suffixes):
        size = storage.size(source)
        if size is not None:
            yield File(source.rpartition("/")[2], size, etag=storage.etag(source) or "")
            return
    for entry in storage.list_tree(source):
        if is_container(entry.name, suffixes) and not is_hidden(entry.name):
            if "" in entry.name.split("/"):
                raise UserError(
                    f"{source.rstrip('/')}/{entry.name} has `//` in its key, which is no path; "
                    "rename the object."
                )
            yield File(entry.name, entry.size, etag=entry.etag)


def first_file(source: str, suffixes: tuple[str, ...]) -> File:
    """Return the first container that is not empty.

    Raises:
        UserError: there is none.
    """
    for file in list_files(source, suffixes):
        if file.size:
            return file
    raise UserError(
        f"--source {source} holds no {' or '.join(suffixes)} file with anything in it; check the "
        "path."
    )


def named_splits(ids: Iterable[str]) -> tuple[str, ...]:
    """Return which of val and test the paths of a source name, if they name two splits at least.

    `train-00000-of-00040.parquet` and `validation/0.parquet` do; one word alone may mean anything.
    """
    found = {_named_split(path) for path in ids} - {""}
    return tuple(sorted(found - {"train"})) if len(found) > 1 else ()


def file_split(path: str, named: Collection[str]) -> str:
    """Return the split that a path names, if it is one of `named`, else nothing."""
    split = _named_split(path)
    return split if split in named else ""


def _named_split(path: str) -> str:
    for part in reversed(path.split("/")):
        if match := _SPLIT_WORD.match(part):
            return _SPLITS[match[1].lower()]
    return ""
