"""gs:// and az:// for all but the hot path, through obstore: writing, listing, deleting.

Credentials are the provider's own chain: `GOOGLE_APPLICATION_CREDENTIALS` or the metadata server;
`AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY`, a service principal, a managed or a
workload identity.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from orchestrator.stores import objects
from orchestrator.stores.faults import MissingError, StorageError
from orchestrator.stores.local import Entry

# Between tries of writers that meet: a few times what a request takes.
_MOMENT_S = 0.2


def write_atomic(uri: str, content: bytes) -> None:
    """Write an object: readers see the old one or all of the new one."""
    key = objects.split(uri)[2]
    objects.repeated(
        lambda: obstore.put(objects.store_of(uri), key, content), uri=uri, verb="write"
    )


def create(uri: str, content: bytes) -> bool:
    """Write a new object (also in S3); return whether there was none: of several writers one wins.

    A repeated request may meet what the first one wrote: that counts as written here.
    """
    key = objects.split(uri)[2]

    def put() -> bool:
        try:
            obstore.put(objects.store_of(uri), key, content, mode="create")
        except AlreadyExistsError:
            return False
        return True

    made: bool = objects.repeated(put, uri=uri, verb="write")
    return made or bytes(objects.get(uri)) == content


def append(uri: str, lines: bytes) -> None:
    """Add lines to an object that is small: buckets can only write it anew.

    Of several writers none loses a line: each writes only over what it has read.
    """
    key, tried = objects.split(uri)[2], False

    def put() -> bool:
        nonlocal tried
        store = objects.store_of(uri)
        try:
            found = obstore.get(store, key)
        except FileNotFoundError:
            return create(uri, lines)
        old = bytes(found.bytes())
        if tried and lines in old:
            return True  # a repeated request meets what the first one wrote
        tried = True
        try:
            obstore.put(store, key, old + lines, mode=_only_over(uri, found.meta))
        except (PreconditionError, AlreadyExistsError):  # 412, and AWS's 409 for two at once
            return False
        return True

    while not objects.repeated(put, uri=uri, verb="write"):
        time.sleep(random.uniform(0.0, _MOMENT_S))


def _only_over(uri: str, found: Mapping[str, Any]) -> Any:
    """Return the mode that writes over this version only, where storage names versions."""
    name = "version" if uri.startswith("gs://") else "e_tag"
    return {name: found[name]} if found[name] else "overwrite"


def upload(source: Path, uri: str) -> None:
    """Copy a local file to an object, in parts where it is large."""
    key = objects.split(uri)[2]
    objects.repeated(lambda: obstore.put(objects.store_of(uri), key, source), uri=uri, verb="write")


def download(uri: str, target: Path) -> None:
    """Copy an object to a local path."""
    target.write_bytes(objects.get(uri))


def list_folder(uri: str) -> Iterator[Entry]:
    """Yield what lies directly in a folder, by name; all of it is held at once."""
    _, _, key = objects.split(uri)
    found = objects.repeated(
        lambda: obstore.list_with_delimiter(objects.store_of(uri), _prefix(key)),
        uri=uri,
        verb="list",
    )
    start = len(_prefix(key))
    folders = [Entry(p[start:].rstrip("/"), True, 0) for p in found["common_prefixes"]]
    files = [
        Entry(o["path"][start:], False, o["size"], objects.bare(o["e_tag"] or ""))
        for o in found["objects"]
    ]
    yield from sorted(folders + files)


def list_tree(uri: str, after: str = "") -> Iterator[Entry]:
    """Yield every object below a folder behind `after`, by name, holding one page at once."""
    pages = _Pages(uri, after)
    while page := objects.repeated(pages.ask, uri=uri, verb="list"):
        yield from page


class _Pages:
    """The pages of a listing; after a failed one, a new listing begins where the last one ended."""

    def __init__(self, uri: str, after: str) -> None:
        self._uri = uri
        self._prefix = _prefix(objects.split(uri)[2])
        self._last = self._prefix + after if after else ""
        self._stream: Iterator[Sequence[obstore.ObjectMeta]] | None = None

    def ask(self) -> list[Entry]:
        """Return the next page, empty at the end."""
        if self._stream is None:
            store = objects.store_of(self._uri)
            self._stream = iter(obstore.list(store, self._prefix, offset=self._last or None))
        try:
            found = [
                (o["path"], o["size"], objects.bare(o["e_tag"] or ""))
                for o in next(self._stream, ())
            ]
        except BaseError:
            self._stream = None
            raise
        # A server that does not know of offsets begins from the start.
        fresh = [entry for entry in found if entry[0] > self._last]
        if found and not fresh:
            return self.ask()
        self._last = fresh[-1][0] if fresh else self._last
        return [Entry(path[len(self._prefix) :], False, size, tag) for path, size, tag in fresh]


def _prefix(key: str) -> str:
    return f"{key.rstrip('/')}/" if key.strip("/") else ""


def delete_file(uri: str) -> None:
    """Delete an object; nothing there is fine."""
    key = objects.split(uri)[2]
    try:
        objects.repeated(lambda: obstore.delete(objects.store_of(uri), key), uri=uri, verb="delete")
    except MissingError:
        return


def delete_folder(uri: str) -> None:
    """Delete everything below a prefix; nothing there is fine."""
    base = uri.rstrip("/")
    for entry in list_tree(uri):
        delete_file(f"{base}/{entry.name}")


def explain(error: BaseException, *, uri: str, verb: str) -> StorageError | None:
    """Return None: objects.py has said all there is to say."""
    return None
