"""Which S3 endpoint this process asks and who it is, for every client alike: botocore's own chain.

The chain is variables, profile, `credential_process`, web identity, container, instance role.
"""

import datetime
import functools
import os
import threading
from typing import Any

import botocore.exceptions
import botocore.session

from orchestrator.stores.faults import StorageError

_lock = threading.Lock()
_generation = 0
_environment = 0


def endpoint() -> str | None:
    """Return the URL of the user's own endpoint, or None for AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def virtual_hosts() -> bool:
    """Return whether buckets are host names (`AWS_VIRTUAL_HOSTED_STYLE_REQUEST`) or paths."""
    default = "false" if endpoint() else "true"
    return os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", default).lower() in ("1", "true")


def generation() -> int:
    """Return a number that grows when the environment must be read anew."""
    return _generation


def environment() -> int:
    """Return a number that grows when the `AWS_*` variables were changed on purpose."""
    return _environment


def forget() -> None:
    """Read the environment anew from now on: who this process is and whom it asks may differ."""
    global _environment
    _environment += 1
    renew(_generation)


def renew(seen: int) -> None:
    """Ask the provider chain anew, unless a thread did since generation `seen`."""
    global _generation
    with _lock:
        if _generation == seen:
            _generation += 1


def masked_key() -> str:
    """Return the start of the access key's id: enough to tell whose it is, and no secret."""
    credentials = _credentials(os.getpid(), _generation)
    if credentials is None:
        return "nobody (no credentials)"
    return f"access key {credentials.get_frozen_credentials().access_key[:4]}..."


def reader_options(bucket: str, client: dict[str, Any]) -> dict[str, Any]:
    """Return obstore's options for a bucket.

    Raises:
        StorageError: there are no credentials, or the endpoint is no URL.
    """
    url = endpoint()
    if url is not None and not url.startswith(("http://", "https://")):
        raise StorageError(
            f"cannot open s3://{bucket}: AWS_ENDPOINT_URL={url} is no URL; write it as "
            "http://host:port."
        )
    virtual = virtual_hosts() and "." not in bucket  # a certificate covers one level of names
    if url is not None and virtual:
        scheme, _, host = url.rstrip("/").partition("://")
        url = f"{scheme}://{bucket}.{host}"
    options: dict[str, Any] = {
        "region": _region(os.getpid(), _generation),
        "virtual_hosted_style_request": virtual,
        "credential_provider": _provider(bucket),
        "client_options": client | {"allow_http": bool(url) and str(url).startswith("http://")},
    }
    authority = os.environ.get("AWS_CA_BUNDLE")
    if authority:
        with open(authority, "rb") as file:
            options["client_options"]["root_certificate"] = file.read()
    return options | ({"endpoint": url} if url is not None else {})


def _provider(bucket: str) -> Any:
    credentials = _credentials(os.getpid(), _generation)
    if credentials is None:
        raise StorageError(
            f"cannot open s3://{bucket}: there are no credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or run where an instance role is attached."
        )

    def provide() -> dict[str, Any]:
        # botocore renews them when they are about to expire; obstore asks again five minutes
        # before `expires_at`.
        frozen = credentials.get_frozen_credentials()
        end = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": end and end.astimezone(datetime.UTC),
        }

    return provide


@functools.lru_cache(maxsize=1)
def _session(pid: int, generation: int) -> Any:
    return botocore.session.get_session()


@functools.lru_cache(maxsize=1)
def _credentials(pid: int, generation: int) -> Any:
    try:
        return _session(pid, generation).get_credentials()
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StorageError(
            f"the credentials cannot be read ({error}); mend the profile."
        ) from error


@functools.lru_cache(maxsize=1)
def _region(pid: int, generation: int) -> str:
    return str(
        os.environ.get("AWS_REGION")
        or _session(pid, generation).get_config_variable("region")
        or "us-east-1"
    )
