"""S3 for all but the hot path: writing and listing through s3fs, which Lightning uses as well.

Credentials and endpoint come from the usual `AWS_*` variables, profiles or the instance's role, and
are never stored. s3fs loses no request at 20 % of 503 answers, where pyarrow's default strategy
loses 2 to 4 %. What is read goes through objects.py, with the same endpoint and credentials.
"""

import functools
import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import s3fs

from orchestrator.stores import identity
from orchestrator.stores.faults import DeniedError, MissingError, StorageError
from orchestrator.stores.local import Entry

# botocore's adaptive mode backs off with jitter and lowers the request rate after 503s.
_CONFIG = {"retries": {"max_attempts": 10, "mode": "adaptive"}, "connect_timeout": 5}
# Those retries take 50 to 80 s to give up on an endpoint that was never there; a probe says so at
# once when the client is made.
_PROBES = 2
_PROBE_TIMEOUT_S = 4


def client() -> s3fs.S3FileSystem:
    """Return this process's client.

    Raises:
        botocore.exceptions.EndpointConnectionError: the endpoint does not answer.
    """
    return _client_of_process(os.getpid())


@functools.cache
def _client_of_process(pid: int) -> s3fs.S3FileSystem:
    # One client a process: its event loop and connections do not survive a fork.
    made = s3fs.S3FileSystem(
        endpoint_url=identity.endpoint(),
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs=_CONFIG | _addressing(),
    )
    _check_reachable(made.s3.meta.endpoint_url)
    return made


def _addressing() -> dict[str, Any]:
    # Where nothing is said botocore chooses by itself: paths for hosts that are numbers.
    return {"s3": {"addressing_style": "virtual"}} if identity.virtual_hosts() else {}


def forget_client() -> None:
    """Drop this process's clients, so that changed `AWS_*` variables take effect."""
    _client_of_process.cache_clear()
    identity.forget()


def _check_reachable(url: str) -> None:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    for probe in range(_PROBES):
        try:
            socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S).close()
            return
        except OSError as error:
            if probe == _PROBES - 1:
                raise botocore.exceptions.EndpointConnectionError(endpoint_url=url) from error


def list_pages(
    bucket: str, prefix: str, *, delimiter: str, after: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield the pages (at most 1,000 keys each) of a listing, asking for one when it is wanted."""
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    if after:
        request["StartAfter"] = after
    while True:
        page = client().call_s3("list_objects_v2", **request)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def split(uri: str) -> tuple[str, str]:
    """Return (bucket, key) of an S3 URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def get_object(uri: str, span: tuple[int, int] | None) -> tuple[memoryview, tuple[int, str]]:
    """Return an object's bytes and its (size, ETag): for what obstore cannot serve."""
    meta = head_object(uri)
    start, stop = span or (None, None)
    return memoryview(client().cat_file(uri, start=start, end=stop)), meta


def head_object(uri: str) -> tuple[int, str]:
    """Return an object's (size in bytes, ETag)."""
    bucket, key = split(uri)
    found = client().call_s3("head_object", Bucket=bucket, Key=key)
    return int(found["ContentLength"]), str(found["ETag"])


def write_atomic(uri: str, content: bytes) -> None:
    """Write an object: readers see the old one or all of the new one."""
    client().pipe_file(uri, content)


def upload(source: Path, uri: str) -> None:
    """Copy a local file to an object, in parts where it is large."""
    client().put_file(str(source), uri)


def download(uri: str, target: Path) -> None:
    """Copy an object to a local path."""
    client().get_file(uri, str(target))


def list_folder(uri: str) -> Iterator[Entry]:
    """Yield what lies directly in a folder, by name, holding one page at once."""
    return _list(uri, delimiter="/")


def list_tree(uri: str, after: str = "") -> Iterator[Entry]:
    """Yield every object below a folder, named relative to it, holding one page at once."""
    return _list(uri, delimiter="", after=after)


def _list(uri: str, *, delimiter: str, after: str = "") -> Iterator[Entry]:
    bucket, key = split(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    start = f"{prefix}{after}" if after else ""
    for page in list_pages(bucket, prefix, delimiter=delimiter, after=start):
        folders = [
            Entry(p["Prefix"][len(prefix) :].rstrip("/"), True, 0)
            for p in page.get("CommonPrefixes", ())
        ]
        files = [
            Entry(o["Key"][len(prefix) :], False, o["Size"], o.get("ETag", "").strip('"'))
            for o in page.get("Contents", ())
            if not o["Key"].endswith("/")  # an empty object that marks a folder
        ]
        yield from sorted(folders + files)


def delete_file(uri: str) -> None:
    """Delete an object; nothing there is fine."""
    client().rm_file(uri)


def delete_folder(uri: str) -> None:
    """Delete everything below a prefix; nothing there is fine."""
    if client().exists(uri):
        client().rm(uri, recursive=True)


def explain(error: BaseException, *, uri: str, verb: str) -> StorageError | None:
    """Return a client's error as one sentence, or None where its meaning is not known."""
    start = f"cannot {verb} {uri}: "
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return MissingError(
            f"{start}there is no such bucket or key; check the spelling (keys are case-sensitive)."
        )
    if isinstance(error, PermissionError) or "403" in text or "Forbidden" in text:
        return DeniedError(
            f"{start}the credentials are wrong or lack the right (403 for {identity.masked_key()});"
            " check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy."
        )
    reason = _reason(error)
    return StorageError(start + reason) if reason else None


def _reason(error: BaseException) -> str | None:
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        return (
            "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or run where an instance role is attached."
        )
    if isinstance(
        error, (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError)
    ):
        return (
            f"the endpoint {identity.endpoint() or 'of AWS'} does not answer; check "
            "AWS_ENDPOINT_URL and the network."
        )
    if isinstance(error, ValueError) and "Invalid endpoint" in str(error):
        return f"AWS_ENDPOINT_URL={identity.endpoint()} is no URL; write it as http://host:port."
    # s3fs gives answers such as 500 and 503 an errno, once its own retries are over.
    botocores = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
    if isinstance(error, botocores) or (isinstance(error, OSError) and error.errno is not None):
        said = " ".join(str(error).split())
        return f"the server refuses ({said}); try again later, or ask who runs it."
    return None
