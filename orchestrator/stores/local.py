"""Local folders: atomic writes, listings by name, ranges without a copy in Python."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

from orchestrator.stores.faults import ChangedError, DeniedError, MissingError, StorageError

_PATH_FAULTS = {
    errno.ELOOP: "its symbolic links lead in a circle; remove them.",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one.",
}
_FAULTS = {
    errno.EIO: "the disk reports an error; check it, or restore the file.",
    errno.ENOSPC: "the disk is full; free some space, or choose another path.",
    errno.EDQUOT: "the quota is used up; free some space, or choose another path.",
    errno.EROFS: "the file system is read-only; mount it for writing, or choose another path.",
    errno.ESTALE: "the network file system no longer knows it; check the server and mount again.",
}


class Entry(NamedTuple):
    """One object or folder of a listing."""

    name: str
    is_folder: bool
    size: int
    etag: str = ""
    """What storage calls this version of a file; empty: listing does not tell."""


def local_path(uri: str) -> Path:
    """Return the local path that a plain path or `file://` URI names.

    Raises:
        StorageError: it has another scheme.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme not in ("", "file"):
        raise StorageError(
            f"{uri}: the scheme {scheme!r} is not supported; use s3://, gs://, az://, file:// or a "
            "plain path."
        )
    return Path(uri.removeprefix("file://")).expanduser()


def read_bytes(uri: str) -> bytes:
    """Return a file's content."""
    return local_path(uri).read_bytes()


def read_ranges(
    uri: str, ranges: Sequence[tuple[int, int]], *, etag: str | None, size: int | None
) -> list[memoryview]:
    """Return byte ranges of a file; see `storage.read_ranges`.

    pread and not a mapping: a file cut short under a mapping kills the process with SIGBUS.
    """
    descriptor = os.open(local_path(uri), os.O_RDONLY)
    try:
        found = os.fstat(descriptor)
        if etag is not None and _etag(found) != etag:
            raise ChangedError(f"{uri} was written again since it was indexed; pack again.")
        if size is not None and found.st_size != size:
            raise ChangedError(
                f"{uri} has {found.st_size} bytes but the index says {size}; restore it or pack "
                "again."
            )
        return [_pread(uri, descriptor, start, stop) for start, stop in ranges]
    finally:
        os.close(descriptor)


def _pread(uri: str, descriptor: int, start: int, stop: int) -> memoryview:
    content = os.pread(descriptor, stop - start, start)
    while len(content) < stop - start:  # Linux reads at most 2 GiB at once
        more = os.pread(descriptor, stop - start - len(content), start + len(content))
        if not more:
            raise ChangedError(
                f"{uri} ends at byte {start + len(content)} but bytes up to {stop} are indexed; "
                "restore it or pack again."
            )
        content += more
    return memoryview(content)


def open_input(uri: str) -> IO[bytes]:
    """Open a file for reading."""
    return local_path(uri).open("rb")


def write_atomic(uri: str, content: bytes) -> None:
    """Write `content` so that a reader sees either the old file or all of the new one."""
    path = local_path(uri)
    with _beside(path, content) as written:
        os.replace(written, path)
    _fsync_folder(path.parent)


def create(uri: str, content: bytes) -> bool:
    """Write a new file; return whether there was none before: of several writers one wins."""
    path = local_path(uri)
    with _beside(path, content) as written:
        try:
            os.link(written, path)  # unlike a rename, it never replaces
        except FileExistsError:
            return False
    _fsync_folder(path.parent)
    return True


@contextlib.contextmanager
def _beside(path: Path, content: bytes) -> Iterator[str]:
    """Write a file in the folder of `path` and yield its name; it is gone at the block's end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            yield file.name
        finally:  # not left to `delete`: it forgets a file that cannot be flushed
            Path(file.name).unlink(missing_ok=True)


def append(uri: str, lines: bytes) -> None:
    """Add lines to a file; one that a kill cut off does not swallow them."""
    with local_path(uri).open("ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        file.write(lines)


def upload(source: Path, uri: str) -> None:
    """Copy a file to `uri`, atomically."""
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with source.open("rb") as reader, partial.open("wb") as writer:
        while block := reader.read(1 << 20):
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    os.replace(partial, path)
    _fsync_folder(path.parent)


def download(uri: str, target: Path) -> None:
    """Copy a file to a local path."""
    target.write_bytes(local_path(uri).read_bytes())


def _fsync_folder(path: Path) -> None:
    # A rename is durable only once its folder is.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def info(uri: str) -> tuple[int, str] | None:
    """Return a file's (size, ETag), or None where there is none."""
    path = local_path(uri)
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_size, _etag(found)) if path.is_file() else None


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def list_folder(uri: str) -> Iterator[Entry]:
    """Yield what lies directly in a folder, by name, but for pipes, sockets and devices."""
    path = local_path(uri)
    if path.is_dir():
        with os.scandir(path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            if found := _look(entry):
                yield found


def list_tree(uri: str, after: str = "") -> Iterator[Entry]:
    """Yield every file below a folder whose name, relative to it, is greater than `after`."""
    return (entry for entry in _tree(uri) if entry.name > after)


def _tree(uri: str) -> Iterator[Entry]:
    for entry in list_folder(uri):
        if not entry.is_folder:
            yield entry
            continue
        for inner in _tree(f"{uri.rstrip('/')}/{entry.name}"):
            yield inner._replace(name=f"{entry.name}/{inner.name}")


def _look(entry: "os.DirEntry[str]") -> Entry | None:
    try:
        found = entry.stat()
    except (FileNotFoundError, PermissionError):  # a bad link: whoever reads it says so
        return Entry(entry.name, False, 0)
    if stat.S_ISDIR(found.st_mode):
        return Entry(entry.name, True, 0)
    if stat.S_ISREG(found.st_mode):
        return Entry(entry.name, False, found.st_size, _etag(found))
    return None  # opening a pipe would wait for its writer


def delete_file(uri: str) -> None:
    """Delete a file; nothing there is fine."""
    local_path(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Delete everything below a folder; nothing there is fine."""
    path = local_path(uri)
    for root, folders, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(root, name))
        for name in folders:
            os.rmdir(os.path.join(root, name))
    if path.is_dir():
        path.rmdir()


def explain(error: BaseException, *, uri: str, verb: str) -> StorageError | None:
    """Return an error of the system as one sentence, or None where it is none of storage's."""
    start = f"cannot {verb} {uri}: "
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{start}there is no such file or folder; check the path.")
    if isinstance(error, PermissionError):
        return DeniedError(
            f"{start}permission denied; run as a user with the right, or choose another path."
        )
    if verb == "read" and isinstance(error, (NotADirectoryError, IsADirectoryError)):
        return MissingError(f"{start}it is a folder, or lies below a file; check the path.")
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return StorageError(
            f"{start}a file lies where a folder is needed (or the reverse); choose another path."
        )
    if isinstance(error, OSError) and error.errno in _PATH_FAULTS:
        kind = MissingError if verb == "read" else StorageError
        return kind(f"{start}{_PATH_FAULTS[error.errno]}")
    if isinstance(error, OSError) and error.errno is not None:
        said = f"{error.strerror}; check the file system, or choose another path."
        return StorageError(f"{start}{_FAULTS.get(error.errno, said)}")
    return None  # such as a damaged archive, which is read through here
