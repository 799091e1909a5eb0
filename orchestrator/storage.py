"""URI -> filesystem: reading, listing, atomic writes; local folders and S3 alike.

A URI is `s3://bucket/key`, `file:///path` or a plain path. The S3 client is made in s3.py, which
only this file uses.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import urlsplit

import pyarrow.fs

from orchestrator import s3
from orchestrator.config import UserError


class StorageError(UserError):
    """A URI that cannot be read or written, with the reason and the remedy in one sentence."""


class Entry(NamedTuple):
    """One object or folder of a listing."""

    name: str
    is_folder: bool
    size: int


def is_s3(uri: str) -> bool:
    """Return whether `uri` lies in an S3 bucket."""
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """Return the local path that a plain path or `file://` URI names.

    Raises:
        StorageError: it has another scheme.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme not in ("", "file"):
        raise StorageError(
            f"{uri}: the scheme {scheme!r} is not supported; use s3://, file:// or a plain path."
        )
    return Path(uri.removeprefix("file://")).expanduser()


def absolute(uri: str) -> str:
    """Return `uri` such that every process of the cluster resolves it alike."""
    return uri.rstrip("/") if is_s3(uri) else str(local_path(uri).resolve())


def join(uri: str, *parts: str) -> str:
    """Return the URI of something below `uri`."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def read_bytes(uri: str) -> bytes:
    """Return the whole content of one object or file.

    Raises:
        StorageError: it is missing, or may not or cannot be read.
    """
    with explained(uri, "read"):
        if is_s3(uri):
            content: bytes = s3.client().cat_file(uri)
            return content
        return local_path(uri).read_bytes()


def open_input(uri: str) -> IO[bytes]:
    """Open one object or file for random reads (no read-ahead: Parquet asks for what it needs)."""
    with explained(uri, "read"):
        if is_s3(uri):
            opened: IO[bytes] = s3.client().open(uri, "rb", cache_type="none")
            return opened
        return local_path(uri).open("rb")


def write_atomic(uri: str, content: bytes) -> None:
    """Write `content` so that a reader sees either the old object or all of the new one."""
    with explained(uri, "write"):
        if is_s3(uri):
            s3.client().pipe_file(uri, content)
            return
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        _fsync_folder(path.parent)


def upload(source: Path, uri: str) -> None:
    """Copy a local file to `uri`, in parts where the target is S3 and the file is large."""
    with explained(uri, "write"):
        if is_s3(uri):
            s3.client().put_file(str(source), uri)
            return
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
    """Copy one object or file to a local path."""
    with explained(uri, "read"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_s3(uri):
            s3.client().get_file(uri, str(target))
        else:
            target.write_bytes(local_path(uri).read_bytes())


def _fsync_folder(path: Path) -> None:
    # A rename is durable only once its folder is.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(uri: str) -> bool:
    """Return whether an object or file (not a folder) is there."""
    return size(uri) is not None


def size(uri: str) -> int | None:
    """Return the size in bytes of one object or file, or None where there is none."""
    with explained(uri, "read"):
        try:
            if is_s3(uri):
                info = s3.client().info(uri)
                return int(info["size"]) if info["type"] == "file" else None
            path = local_path(uri)
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None


def list_folder(uri: str) -> Iterator[Entry]:
    """Yield what lies directly in a folder, by name, holding one page (1,000) of a bucket at once.

    A missing folder yields nothing; a missing bucket raises.
    """
    with explained(uri, "list"):
        if is_s3(uri):
            yield from _list_s3(uri, delimiter="/")
            return
        path = local_path(uri)
        if path.is_dir():
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                folder = entry.is_dir()
                yield Entry(entry.name, folder, 0 if folder else _size_of(entry))


def list_tree(uri: str) -> Iterator[Entry]:
    """Yield every file below a folder, named relative to it, in an order that does not change.

    Holds one page of a bucket, or one local folder of each depth, at once.
    """
    if is_s3(uri):
        with explained(uri, "list"):
            yield from _list_s3(uri, delimiter="")
        return
    for entry in list_folder(uri):
        if not entry.is_folder:
            yield entry
            continue
        for inner in list_tree(join(uri, entry.name)):
            yield inner._replace(name=f"{entry.name}/{inner.name}")


def _size_of(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a link to nothing: whoever reads it says so
        return 0


def _list_s3(uri: str, *, delimiter: str) -> Iterator[Entry]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    for page in s3.list_pages(bucket, prefix, delimiter=delimiter):
        folders = [
            Entry(p["Prefix"][len(prefix) :].rstrip("/"), True, 0)
            for p in page.get("CommonPrefixes", ())
        ]
        files = [
            Entry(o["Key"][len(prefix) :], False, o["Size"])
            for o in page.get("Contents", ())
            if not o["Key"].endswith("/")  # an empty object that marks a folder
        ]
        yield from sorted(folders + files)


def delete_file(uri: str) -> None:
    """Delete one object or file; nothing there is fine."""
    with explained(uri, "delete"):
        if is_s3(uri):
            s3.client().rm_file(uri)
        else:
            local_path(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Delete everything below `uri`; nothing there is fine."""
    with explained(uri, "delete"):
        if is_s3(uri):
            if s3.client().exists(uri):
                s3.client().rm(uri, recursive=True)
            return
        path = local_path(uri)
        for root, folders, files in os.walk(path, topdown=False):
            for name in files:
                os.unlink(os.path.join(root, name))
            for name in folders:
                os.rmdir(os.path.join(root, name))
        if path.is_dir():
            path.rmdir()


def check_writable(uri: str) -> None:
    """Write and remove a small object below `uri`, so that a refusal comes before any work.

    Raises:
        StorageError: with the reason and the remedy.
    """
    probe = join(uri, f".probe-{os.getpid()}")
    write_atomic(probe, b"")
    delete_file(probe)


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return pyarrow's filesystem and path for `uri`: what Ray Train wants for its own records."""
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), str(local_path(uri))
    scheme, _, host = (s3.endpoint() or "").rstrip("/").rpartition("://")
    options = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    return pyarrow.fs.S3FileSystem(**options), uri.removeprefix("s3://")


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
        reason = _reason(error, self.uri)
        if reason is not None:
            raise StorageError(f"cannot {self.verb} {self.uri}: {reason}") from error


def _reason(error: BaseException, uri: str) -> str | None:
    if is_s3(uri):
        return s3.explain(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder; check the path."
    if isinstance(error, PermissionError):
        return "permission denied; run as a user with the right, or choose another path."
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return "a file lies where a folder is needed (or the reverse); choose another path."
    return None
