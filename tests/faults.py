"""A proxy in front of the S3 server that refuses, cuts, stalls, flips and vanishes, as scripted.

Seeded and on loopback. It forwards what the client signed byte for byte, Host header included, so
the real server behind it still checks every signature; and it logs each request for tests to count.
"""

import contextlib
import dataclasses
import http.client
import http.server
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Literal
from urllib.parse import urlsplit

from s3 import S3Server

Fault = Literal["", "refuse", "cut", "stall", "flip", "gone", "answer"]
# What S3 says when it is too busy: a mixture, so that no single text is relied upon.
_REFUSALS = [(503, "SlowDown"), (503, "ServiceUnavailable"), (500, "InternalError")]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclasses.dataclass
class Faults:
    """What goes wrong now; set while requests run. Shares are of requests, between 0 and 1."""

    refuse: float = 0.0
    """Answered 503 SlowDown, 503 ServiceUnavailable or 500 InternalError, in equal parts."""
    cut: float = 0.0
    """The body ends half-way and the connection closes."""
    stall: float = 0.0
    """Half of the body comes, then nothing for `stall_s`."""
    stall_s: float = 60.0
    delay_s: float = 0.0
    """Every answer comes so much later, as from far away."""
    flip: float = 0.0
    """One byte of the body differs."""
    outage: bool = False
    """Every connection is closed without an answer."""
    missing: str | None = None
    """Keys this pattern is found in are answered 404."""
    denied: str | None = None
    """Keys this pattern is found in are answered 403 AccessDenied."""
    capacity_per_s: float | None = None
    """Requests/s above which the rest is answered 503 SlowDown."""
    expired: Callable[[str], bool] | None = None
    """Whether requests signed with this access key id are answered 400 ExpiredToken."""
    unsigned: bool = False
    """Requests go on without their signature or token (to a bucket that anybody may use)."""
    methods: tuple[str, ...] = ("GET", "HEAD")
    """Requests that faults happen to; an outage and a capacity are for all."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the log."""

    at: float
    """time.monotonic() when it came."""
    method: str
    key: str
    """The path without its query: "/bucket/key"."""
    host: str
    range: str
    access_key: str
    status: int
    """What was answered; 0: nothing."""
    fault: Fault


class FaultProxy:
    """A running proxy; `faults` may be changed at any time, `log` grows."""

    def __init__(self, upstream: S3Server, seed: int) -> None:
        self.upstream = upstream
        self.faults = Faults()
        self.log: list[Request] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._recent: list[float] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        """The URL that clients are given."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """The `AWS_*` variables of a user who goes through the proxy."""
        return self.upstream.env | {"AWS_ENDPOINT_URL": self.endpoint}

    def gets(self, pattern: str = "") -> list[Request]:
        """Return the logged GET requests for keys that a pattern is found in."""
        return [r for r in self.log if r.method == "GET" and re.search(pattern, r.key)]

    def decide(self, method: str, key: str, access_key: str) -> tuple[Fault, int, str]:
        """Return (fault, status, error code) for a request that has just come."""
        faults = self.faults
        with self._lock:
            draw, pick = self._random.random(), self._random.choice(_REFUSALS)
            now = time.monotonic()
            self._recent = [at for at in self._recent if at > now - 1] + [now]
            busy = faults.capacity_per_s is not None and len(self._recent) > faults.capacity_per_s
        if faults.outage:
            return "gone", 0, ""
        if faults.expired is not None and faults.expired(access_key):
            return "answer", 400, "ExpiredToken"
        if busy:
            return "refuse", 503, "SlowDown"
        if method in faults.methods:
            if faults.missing is not None and re.search(faults.missing, key):
                return "answer", 404, "NoSuchKey"
            if faults.denied is not None and re.search(faults.denied, key):
                return "answer", 403, "AccessDenied"
            shares: list[tuple[Fault, float]] = [
                ("refuse", faults.refuse),
                ("cut", faults.cut),
                ("stall", faults.stall),
                ("flip", faults.flip),
            ]
            for fault, share in shares:
                if draw < share:
                    return fault, *(pick if fault == "refuse" else (200, ""))
                draw -= share
        return "", 200, ""


@contextlib.contextmanager
def serve_faults(
    upstream: S3Server, *, seed: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[FaultProxy]:
    """Start a proxy in front of a server, with or without TLS, and end it after the block."""
    proxy = FaultProxy(upstream, seed)
    if tls is not None:
        proxy.server.socket = tls.wrap_socket(proxy.server.socket, server_side=True)
    thread = threading.Thread(target=proxy.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()


def _handler(proxy: FaultProxy) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1
        upstream: http.client.HTTPConnection | None = None

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            at = time.monotonic()
            if self.path.startswith("http://"):  # asked as a client asks an HTTP proxy
                self.path = "/" + self.path.split("/", 3)[3]
            key = urlsplit(self.path).path
            signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
            access_key = signed[1] if signed else ""
            body = self._body()
            fault, status, code = proxy.decide(self.command, key, access_key)
            time.sleep(proxy.faults.delay_s)
            host, ranged = self.headers.get("Host", ""), self.headers.get("Range", "")

            def note(status: int) -> None:
                entry = Request(at, self.command, key, host, ranged, access_key, status, fault)
                proxy.log.append(entry)

            if fault in ("refuse", "answer"):
                note(status)
                self._answer(status, code)
            elif fault == "gone":
                note(0)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                response = self._ask(body)
                note(response.status)
                self._forward(response, fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def _body(self) -> bytes:
            self.wfile.flush()  # the client may be waiting for "100 Continue"
            if not self._chunked():
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            raw = b""  # passed on as it came: a checksum may follow the last chunk
            while size := int((line := self.rfile.readline()).split(b";")[0], 16):
                raw += line + self.rfile.read(size) + self.rfile.readline()
            raw += line
            while line.strip():
                line = self.rfile.readline()
                raw += line
            return raw

        def _chunked(self) -> bool:
            return "chunked" in self.headers.get("Transfer-Encoding", "")

        def _answer(self, status: int, code: str) -> None:
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _forward(self, response: http.client.HTTPResponse, fault: Fault) -> None:
            content = response.read()
            self.send_response_only(response.status, HTTPStatus(response.status).phrase)
            for name, value in response.getheaders():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    self.send_header(name, value)
            length = response.headers.get("Content-Length", "0")
            self.send_header(
                "Content-Length", length if self.command == "HEAD" else str(len(content))
            )
            self.end_headers()
            if response.status < 300 and len(content) > 1:
                content = self._spoil(content, fault)
            self.wfile.write(content)

        def _ask(self, body: bytes) -> http.client.HTTPResponse:
            for again in (True, False):
                if self.upstream is None:
                    host = urlsplit(proxy.upstream.endpoint).netloc
                    self.upstream = http.client.HTTPConnection(host, timeout=60)
                try:
                    self.upstream.putrequest(
                        self.command, self.path, skip_host=True, skip_accept_encoding=True
                    )
                    left_out = _HOP_BY_HOP | {"expect", "content-length"}
                    left_out |= {"authorization"} if proxy.faults.unsigned else set()
                    for name, value in self.headers.items():
                        if name.lower() not in left_out:
                            self.upstream.putheader(name, value)
                    if self._chunked():
                        self.upstream.putheader("Transfer-Encoding", "chunked")
                    elif body or self.command in ("PUT", "POST"):
                        self.upstream.putheader("Content-Length", str(len(body)))
                    self.upstream.endheaders(body or None)
                    return self.upstream.getresponse()
                except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                    self.upstream = None  # the server had closed an idle connection
                    if not again:
                        raise
            raise AssertionError

        def _spoil(self, content: bytes, fault: Fault) -> bytes:
            half = len(content) // 2
            if fault == "flip":
                return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
            if fault in ("cut", "stall"):
                self.close_connection = True
                if fault == "stall":
                    self.wfile.write(content[:half])
                    self.wfile.flush()
                    time.sleep(proxy.faults.stall_s)
                    return b""
                return content[:half]
            return content

    return Handler
