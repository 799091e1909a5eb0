"""The hot path: whole objects and byte ranges out of s3://, gs:// and az://, through obstore.

obstore (the Rust crate object_store) takes a tenth of s3fs's CPU time for an object of 100 kB and
two thirds of it for 6 MB, see jobs/bench_read.py. Its own retries are off: retry.Patience repeats,
counts and slows down, so that one rule holds for every scheme and `traffic()` knows every request.
"""

import functools
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store

from orchestrator.stores import answers, faults, identity, s3
from orchestrator.stores.faults import StorageError, TransientError
from orchestrator.stores.retry import PATIENCE_S, Patience, Traffic

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az")

_CLIENT: Any = {
    "connect_timeout": timedelta(seconds=5),
    # No byte for this long is a stall; obstore alone would wait for the whole request's limit.
    "read_timeout": timedelta(seconds=5),
    "timeout": timedelta(seconds=300),
}
_NO_RETRIES: Any = {"max_retries": 0}
# Where nothing was ever served, the endpoint is more likely misspelt than down.
_FIRST_PATIENCE_S = 8.0
# Keys that once worked may be in the middle of a rotation; those that never did are wrong.
_IDENTITY_PATIENCE_S = 20.0
_DENIED_IN_A_ROW = 10

# What obstore refuses to name: empty segments, dots and control characters.
_ODD_KEY = re.compile(r"^/|//|[\x00-\x1f\x7f]|(^|/)\.{1,2}(/|$)")
_ENDPOINTS = {"gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
_REMEDY = {
    "s3": "check AWS_ENDPOINT_URL and the network",
    "gs": "check GOOGLE_BASE_URL and the network",
    "az": "check AZURE_STORAGE_ENDPOINT and the network",
}

_patience = Patience()
_lock = threading.Lock()
_served: set[tuple[str, str, int]] = set()
_denied: Counter[tuple[str, str, int]] = Counter()
_first_pid: int | None = None


def traffic() -> Traffic:
    """Return what this process has asked of buckets on the hot path so far; it only grows."""
    return _patience.traffic


def rate_limit() -> float | None:
    """Return the requests/s this process allows itself now; None: as many as it likes."""
    return _patience.rate.limit_per_s


def split(uri: str) -> tuple[str, str, str]:
    """Return (scheme, bucket or container, key) of a bucket's URI."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def get(
    uri: str,
    span: tuple[int, int] | None = None,
    *,
    etag: str | None = None,
    size: int | None = None,
    patience_s: float | None = None,
) -> memoryview:
    """Return the bytes [start, stop) of an object, or all of it, without a copy in Python.

    Args:
        uri: the object.
        span: (start, stop); None: the whole object.
        etag: what its ETag must be; None: any.
        size: how long the whole object must be in bytes; None: any.
        patience_s: how long transient failures are repeated; None: ten minutes, but only 8 s where
            this process was never served anything from the bucket.

    Raises:
        StorageError: one of its kinds in faults.py.
    """

    def request() -> memoryview:
        content, meta = _send(uri, span, etag)
        _check(uri, meta, num_bytes=len(content), span=span, etag=etag, size=size)
        return content

    content = repeated(request, uri=uri, patience_s=patience_s)
    _patience.received(len(content))
    return content


def repeated(
    request: Callable[[], T], *, uri: str, patience_s: float | None = None, verb: str = "read"
) -> T:
    """Return what one request to a bucket returns, repeating it as retry.Patience says."""
    scheme, bucket, key = split(uri)
    if patience_s is None:
        patience_s = PATIENCE_S if _place(uri) in _served else _FIRST_PATIENCE_S
    url = identity.endpoint() if scheme == "s3" else None
    folder = f"{scheme}://{bucket}/{key.rpartition('/')[0]}".rstrip("/")
    what = f"{folder} at the endpoint {url}" if url else folder
    done = _patience.call(
        _with_identity(request, uri, verb), what=what, remedy=_REMEDY[scheme], patience_s=patience_s
    )
    _served.add(_place(uri))
    _denied.pop(_place(uri), None)
    return done


def _place(uri: str) -> tuple[str, str, int]:
    return *split(uri)[:2], identity.environment()


def _with_identity(request: Callable[[], T], uri: str, verb: str) -> Callable[[], T]:
    """Turn a client's exceptions into ours, and renew credentials that expired."""
    place = _place(uri)
    first_refusal: list[float] = []

    def send() -> T:
        generation = identity.generation()
        try:
            return request()
        except (BaseError, FileNotFoundError) as error:
            verdict, reason = answers.read_error(error)
            if verdict in ("again", "slow"):
                raise TransientError(reason, slow=verdict == "slow") from error
            if verdict == "identity" and place in _served:
                now = time.monotonic()
                first_refusal.append(now)
                if now - first_refusal[0] < _IDENTITY_PATIENCE_S:
                    identity.renew(generation)
                    raise TransientError(f"{reason}, so credentials are renewed") from error
            raise _fault(uri, verdict, reason, verb) from error

    return send


def _fault(uri: str, verdict: faults.Verdict, reason: str, verb: str) -> StorageError:
    if verdict not in ("denied", "identity"):
        return answers.fault(uri, verdict, reason, verb)
    with _lock:
        _denied[_place(uri)] += 1
        everything = verdict == "identity" or _denied[_place(uri)] >= _DENIED_IN_A_ROW
    who = identity.masked_key() if uri.startswith("s3://") else "this process's identity"
    return answers.denied(uri, f"{reason} for {who}", verb, everything=everything)


def _send(
    uri: str, span: tuple[int, int] | None, etag: str | None
) -> tuple[memoryview, tuple[int, str]]:
    """Send one GET; return the content and the whole object's (size, ETag)."""
    if uri.startswith("s3://") and (_forked() or _ODD_KEY.search(split(uri)[2])):
        # s3fs starts anew in a forked process, and takes keys as they are.
        return s3.get_object(uri, span)
    options: Any = {}
    if span is not None:
        options["range"] = span
    if etag is not None:
        options["if_match"] = f'"{bare(etag)}"'
    result = obstore.get(store_of(uri), split(uri)[2], options=options)
    content = memoryview(result.bytes())
    return content, (result.meta["size"], result.meta["e_tag"] or "")


def _check(
    uri: str,
    meta: tuple[int, str],
    *,
    num_bytes: int,
    span: tuple[int, int] | None,
    etag: str | None,
    size: int | None,
) -> None:
    # Not every server knows If-Match, so what it says of the object is compared as well.
    found_size, found_etag = meta
    if etag is not None and found_etag and bare(found_etag) != bare(etag):
        raise faults.ChangedError(
            f"{uri} has the ETag {bare(found_etag)} but the index says {bare(etag)}; restore it or "
            "pack again."
        )
    if size is not None and found_size != size:
        raise faults.ChangedError(
            f"{uri} has {found_size} bytes but the index says {size}; restore it or pack again."
        )
    if span is not None and span[1] > found_size:
        raise faults.ChangedError(
            f"{uri} has {found_size} bytes but bytes up to {span[1]} are indexed; restore it or "
            "pack again."
        )
    if num_bytes != (found_size if span is None else span[1] - span[0]):
        raise TransientError(f"only {num_bytes} bytes arrived")


def bare(etag: str) -> str:
    """Return an ETag without its quotes: servers and clients differ in them."""
    return etag.removeprefix("W/").strip('"')


def head(uri: str) -> tuple[int, str]:
    """Return an object's (size in bytes, ETag).

    Raises:
        StorageError: there is none, or it may not or cannot be read.
    """
    if uri.startswith("s3://") and (_forked() or _ODD_KEY.search(split(uri)[2])):
        return s3.head_object(uri)
    meta = repeated(lambda: obstore.head(store_of(uri), split(uri)[2]), uri=uri)
    return meta["size"], meta["e_tag"] or ""


def store_of(uri: str) -> ObjectStore:
    """Return this process's client for the bucket of a URI."""
    global _first_pid
    if _forked():
        raise StorageError(
            f"cannot read {uri}: this process was forked from one that had read from a bucket, and "
            "the client does not survive that; start processes with the method spawn."
        )
    _first_pid = os.getpid()
    scheme, bucket, _ = split(uri)
    return _store(scheme, bucket, identity.generation())


@functools.lru_cache(maxsize=32)
def _store(scheme: str, bucket: str, generation: int) -> ObjectStore:
    try:
        if scheme == "s3":
            made = identity.reader_options(bucket, _CLIENT)
            return S3Store(bucket, retry_config=_NO_RETRIES, **made)
        url = os.environ.get(_ENDPOINTS[scheme], "")
        client = {**_CLIENT, "allow_http": url.startswith("http://")}
        options: Any = {"client_options": client, "retry_config": _NO_RETRIES}
        return GCSStore(bucket, **options) if scheme == "gs" else AzureStore(bucket, **options)
    except (BaseError, ValueError) as error:
        line = str(error).splitlines()[0]
        names = "AZURE_STORAGE_ACCOUNT_NAME and a key" if scheme == "az" else "the credentials"
        raise StorageError(f"cannot open {scheme}://{bucket}: {line}; set {names}.") from error


def _forked() -> bool:
    # Measured with obstore 0.12.1: after a fork, its first call never returns.
    return _first_pid is not None and _first_pid != os.getpid()


def _start_over() -> None:
    # A thread of the parent may have held a lock at the fork.
    global _patience, _lock
    _patience, _lock = Patience(), threading.Lock()


os.register_at_fork(after_in_child=_start_over)
