"""This process's S3 client: endpoint, retries, pages of a listing, and what its errors mean.

Credentials and endpoint come from the usual `AWS_*` variables (or the instance's role) and are
never stored. s3fs is the client because it loses no request at 20 % of 503 answers, where pyarrow's
default strategy loses 2 to 4 %.
"""

import functools
import os
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import s3fs

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
        endpoint_url=endpoint(),
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs=_CONFIG,
    )
    _check_reachable(made.s3.meta.endpoint_url)
    return made


def forget_client() -> None:
    """Drop this process's client, so that changed `AWS_*` variables take effect."""
    _client_of_process.cache_clear()


def endpoint() -> str | None:
    """Return the URL of the user's own endpoint, or None for AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


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


def list_pages(bucket: str, prefix: str, *, delimiter: str) -> Iterator[dict[str, Any]]:
    """Yield the pages (at most 1,000 keys each) of a listing, asking for one when it is wanted."""
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    while True:
        page = client().call_s3("list_objects_v2", **request)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def explain(error: BaseException) -> str | None:
    """Return what an error means and what to do, or None where that is not known."""
    text = str(error)
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        return (
            "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or run where an instance role is attached."
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket or key; check the spelling (keys are case-sensitive)."
    if isinstance(error, PermissionError) or "403" in text or "Forbidden" in text:
        return (
            "the credentials are wrong or lack the right (403); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the bucket's policy."
        )
    if isinstance(
        error, (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError)
    ):
        return (
            f"the endpoint {endpoint() or 'of AWS'} does not answer; check AWS_ENDPOINT_URL "
            "and the network."
        )
    if isinstance(error, ValueError) and "Invalid endpoint" in text:
        return f"AWS_ENDPOINT_URL={endpoint()} is no URL; write it as http://host:port."
    return None
