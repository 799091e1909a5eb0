"""URI -> filesystem: endpoint, credentials, retries, atomic writes. The only place that knows S3.

A URI is `s3://bucket/key`, `file:///path` or a plain path. Credentials and endpoint come from the
usual `AWS_*` variables (or the instance's role) and are never stored. s3fs is the client because it
loses no request at 20 % of 503 answers, where pyarrow's default strategy loses 2 to 4 %.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import botocore.exceptions
import pyarrow.fs
import s3fs

from orchestrator.config import UserError

SCHEMES = ("s3", "file")
# botocore's adaptive mode backs off with jitter and lowers the request rate after 503s.
_S3_CONFIG = {"retries": {"max_attempts": 10, "mode": "adaptive"}, "connect_timeout": 5}


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
        StorageError: the scheme is none of `SCHEMES`.
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


@functools.cache
def _s3_of_process(pid: int) -> s3fs.S3FileSystem:
    # One client a process: its event loop and connections do not survive a fork.
    return s3fs.S3FileSystem(
        endpoint_url=_endpoint(),
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs=_S3_CONFIG,
    )


def s3() -> s3fs.S3FileSystem:
    """Return this process's S3 client."""
    return _s3_of_process(os.getpid())


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def read_bytes(uri: str) -> bytes:
    """Return the whole content of one object or file.

    Raises:
        StorageError: it is missing, or may not or cannot be read.
    """
    with explained(uri, "read"):
        if is_s3(uri):
            content: bytes = s3().cat_file(uri)
            return content
        return local_path(uri).read_bytes()


def open_input(uri: str) -> IO[bytes]:
    """Open one object or file for random reads (no read-ahead: Parquet asks for what it needs)."""
    with explained(uri, "read"):
        if is_s3(uri):
            opened: IO[bytes] = s3().open(uri, "rb", cache_type="none")
            return opened
        return local_path(uri).open("rb")


def write_atomic(uri: str, content: bytes) -> None:
    """Write `content` so that a reader sees either the old object or all of the new one."""
    with explained(uri, "write"):
        if is_s3(uri):
            s3().pipe_file(uri, content)
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
            s3().put_file(str(source), uri)
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
            s3().get_file(uri, str(target))
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
                info = s3().info(uri)
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
            yield from _list_s3(uri)
            return
        path = local_path(uri)
        if path.is_dir():
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                folder = entry.is_dir()
                yield Entry(entry.name, folder, 0 if folder else entry.stat().st_size)


def _list_s3(uri: str) -> Iterator[Entry]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    while True:
        page = s3().call_s3("list_objects_v2", **request)
        folders = [
            Entry(p["Prefix"][len(prefix) :].rstrip("/"), True, 0)
            for p in page.get("CommonPrefixes", ())
        ]
        files = [
            Entry(o["Key"][len(prefix) :], False, o["Size"])
            for o in page.get("Contents", ())
            if o["Key"] != prefix
        ]
        yield from sorted(folders + files)
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def delete_folder(uri: str) -> None:
    """Delete everything below `uri`; nothing there is fine."""
    with explained(uri, "delete"):
        if is_s3(uri):
            if s3().exists(uri):
                s3().rm(uri, recursive=True)
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
    with explained(uri, "write"):
        if is_s3(uri):
            s3().rm_file(probe)
        else:
            local_path(probe).unlink()


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return pyarrow's filesystem and path for `uri`: what Ray Train wants for its own records."""
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), str(local_path(uri))
    scheme, _, host = (_endpoint() or "").rpartition("://")
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
    text = str(error)
    if is_s3(uri):
        if isinstance(error, botocore.exceptions.NoCredentialsError):
            return (
                "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or run where an instance role is attached."
            )
        if isinstance(error, PermissionError) or "403" in text or "Forbidden" in text:
            return (
                "the credentials are wrong or lack the right (403); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and the bucket's policy."
            )
        if isinstance(
            error, (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError)
        ):
            return (
                f"the endpoint {_endpoint() or 'of AWS'} does not answer; check AWS_ENDPOINT_URL "
                "and the network."
            )
        if isinstance(error, FileNotFoundError):
            return "there is no such bucket or key; check the spelling (keys are case-sensitive)."
        return None
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder; check the path."
    if isinstance(error, PermissionError):
        return "permission denied; run as a user with the right, or choose another path."
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return "a file lies where a folder is needed (or the reverse); choose another path."
    return None
