"""URI -> storage: reading, listing, atomic writes; local folders and buckets alike.

A URI is `s3://bucket/key`, `gs://bucket/key`, `az://container/key`, `file:///path` or a plain path.
The one door to `orchestrator.stores`, which knows the clients.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, cast

import pyarrow.fs

from orchestrator.stores import buckets, identity, local, objects, reading, s3
from orchestrator.stores.faults import (
    ChangedError,
    DeniedError,
    LockedOutError,
    MissingError,
    OutageError,
    StorageError,
)
from orchestrator.stores.local import Entry, local_path
from orchestrator.stores.retry import Traffic

__all__ = [
    "ChangedError",
    "DeniedError",
    "Entry",
    "LockedOutError",
    "MissingError",
    "OutageError",
    "StorageError",
    "Traffic",
    "local_path",
]
Ranges = Sequence[tuple[int, int]]


def is_s3(uri: str) -> bool:
    """Return whether `uri` lies in an S3 bucket."""
    return uri.startswith("s3://")


def is_remote(uri: str) -> bool:
    """Return whether `uri` lies in a bucket (S3, Google Cloud or Azure), not in a local folder."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme in objects.SCHEMES


def absolute(uri: str) -> str:
    """Return `uri` such that every process of the cluster resolves it alike."""
    return uri.rstrip("/") if is_remote(uri) else str(local_path(uri).resolve())


def join(uri: str, *parts: str) -> str:
    """Return the URI of something below `uri`."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def read_bytes(uri: str, *, patience_s: float | None = None) -> bytes:
    """Return the whole content of one object or file.

    Args:
        uri: the object or file.
        patience_s: seconds that transient failures are repeated; None: ten minutes, or 8 s where
            the bucket has never served this process anything.

    Raises:
        StorageError: it is missing, or may not or cannot be read.
    """
    with explained(uri, "read"):
        if is_remote(uri):
            return bytes(objects.get(uri, patience_s=patience_s))
        return local.read_bytes(uri)


def read_ranges(
    uri: str,
    ranges: Ranges,
    *,
    etag: str | None = None,
    size: int | None = None,
    patience_s: float = 600.0,
) -> list[memoryview]:
    """Return byte ranges of one object or file, in the order asked for, as views of few buffers.

    From a bucket, ranges at most 1 MB apart come with one request, and requests run in parallel.

    Args:
        uri: the object or file.
        ranges: (start, stop) in bytes; they may overlap and come in any order.
        etag: what `etag(uri)` was when it was indexed; None: not compared.
        size: how long it was in bytes; None: not compared.
        patience_s: seconds that transient failures of a bucket are repeated.

    Raises:
        ChangedError: the ETag or the size differs, or a range lies behind the end.
        MissingError: nothing is there.
        DeniedError: it may not be read; LockedOutError: neither may anything else there.
        OutageError: storage did not answer for `patience_s`.
    """
    with explained(uri, "read"):
        if is_remote(uri):
            return reading.read_ranges(uri, ranges, etag=etag, size=size, patience_s=patience_s)
        return local.read_ranges(uri, ranges, etag=etag, size=size)


def traffic() -> Traffic:
    """Return what this process has read from buckets so far; the totals only grow."""
    return objects.traffic()


def open_input(uri: str) -> IO[bytes]:
    """Open one object or file for random reads (no read-ahead: Parquet asks for what it needs)."""
    with explained(uri, "read"):
        opened = reading.ObjectFile(uri) if is_remote(uri) else local.open_input(uri)
        return cast(IO[bytes], opened)


def write_atomic(uri: str, content: bytes) -> None:
    """Write `content` so that a reader sees either the old object or all of the new one."""
    with explained(uri, "write"):
        _home(uri).write_atomic(uri, content)


def create(uri: str, content: bytes) -> bool:
    """Write `content` where nothing is; return whether that was so: of several writers one wins.

    The content should be unlike any other writer's: a repeated request is known by it.
    """
    with explained(uri, "write"):
        made: bool = (buckets if is_remote(uri) else local).create(uri, content)
        return made


def append(uri: str, lines: bytes) -> None:
    """Add whole lines to an object or file; the folder of a local file must be there."""
    with explained(uri, "write"):
        (buckets if is_remote(uri) else local).append(uri, lines)


def upload(source: Path, uri: str) -> None:
    """Copy a local file to `uri`, in parts where the target is a bucket and the file is large."""
    with explained(uri, "write"):
        _home(uri).upload(source, uri)


def download(uri: str, target: Path) -> None:
    """Copy one object or file to a local path."""
    with explained(uri, "read"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _home(uri).download(uri, target)


def exists(uri: str) -> bool:
    """Return whether an object or file (not a folder) is there."""
    return size(uri) is not None


def size(uri: str) -> int | None:
    """Return the size in bytes of one object or file, or None where there is none."""
    found = _info(uri)
    return found[0] if found else None


def etag(uri: str) -> str | None:
    """Return what storage calls this version of an object or file, or None where there is none.

    A bucket's ETag without quotes; a local file's time of writing and size.
    """
    found = _info(uri)
    return found[1] if found else None


def _info(uri: str) -> tuple[int, str] | None:
    with explained(uri, "read"):
        if not is_remote(uri):
            return local.info(uri)
        try:
            num_bytes, tag = objects.head(uri)
        except MissingError:
            return None
        return num_bytes, objects.bare(tag)


def list_folder(uri: str) -> Iterator[Entry]:
    """Yield what lies directly in a folder, by name, holding one page (1,000) of a bucket at once.

    A missing folder yields nothing; a missing bucket raises.
    """
    with explained(uri, "list"):
        yield from _home(uri).list_folder(uri)


def list_tree(uri: str, *, after: str = "") -> Iterator[Entry]:
    """Yield every file below a folder, named relative to it, in an order that does not change.

    Holds one page of a bucket, or one local folder of each depth, at once. Names up to `after` are
    left out; a bucket does not list them.
    """
    with explained(uri, "list"):
        yield from _home(uri).list_tree(uri, after)


def delete_file(uri: str) -> None:
    """Delete one object or file; nothing there is fine."""
    with explained(uri, "delete"):
        _home(uri).delete_file(uri)


def delete_folder(uri: str) -> None:
    """Delete everything below `uri`; nothing there is fine."""
    with explained(uri, "delete"):
        _home(uri).delete_folder(uri)


def check_writable(uri: str) -> None:
    """Write and remove a small object below `uri`, so that a refusal comes before any work.

    Raises:
        StorageError: with the reason and the remedy.
    """
    probe = join(uri, f".probe-{os.getpid()}")
    write_atomic(probe, b"\n")  # an empty file fits a full disk
    delete_file(probe)


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return pyarrow's filesystem and path for `uri`: what Ray Train wants for its own records."""
    if not is_remote(uri):
        return pyarrow.fs.LocalFileSystem(), str(local_path(uri))
    path = uri.partition("://")[2]
    if uri.startswith("gs://"):
        return pyarrow.fs.GcsFileSystem(), path
    if uri.startswith("az://"):
        return pyarrow.fs.AzureFileSystem(os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")), path
    scheme, _, host = (identity.endpoint() or "").rstrip("/").rpartition("://")
    options = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    return pyarrow.fs.S3FileSystem(**options), path


def _home(uri: str) -> ModuleType:
    if is_s3(uri):
        return s3
    return buckets if is_remote(uri) else local


class explained:
    """Turn a storage client's exception into one sentence for a person."""

    def __init__(self, uri: str, verb: str) -> None:
        self.uri = uri
        self.verb = verb

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (StorageError, GeneratorExit)):
            return
        meant: StorageError | None = _home(self.uri).explain(error, uri=self.uri, verb=self.verb)
        if meant is not None:
            raise meant from error
