"""The one resolver: which storage a URI names, and what is said where it cannot be reached.

gs:// speaks to the real S3 server: Google's XML interface and S3's agree in what is used here.
az:// speaks to a folder of bytes behind Azure's requests, as far as they are used here.
"""

import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow.fs
import pytest
from s3 import PUBLIC_BUCKET, environment, free_ports

from orchestrator import storage
from orchestrator.storage import Entry, StorageError
from orchestrator.stores import identity


@pytest.mark.parametrize(
    ("uri", "remote", "absolute"),
    [
        ("s3://bucket/a/", True, "s3://bucket/a"),
        ("gs://bucket/a", True, "gs://bucket/a"),
        ("az://container/a/", True, "az://container/a"),
        ("file:///data/a", False, "/data/a"),
        ("/data/a/", False, "/data/a"),
    ],
)
def test_a_uri_names_one_place(uri, remote, absolute):
    assert storage.is_remote(uri) is remote
    assert storage.absolute(uri) == absolute


@pytest.mark.parametrize("scheme", ["hdfs", "http", "S3", "gcs"])
def test_another_scheme_is_named(scheme):
    with pytest.raises(StorageError, match=f"the scheme '{scheme.lower()}' is not supported; use"):
        storage.read_bytes(f"{scheme}://bucket/x")


def test_arrow_knows_the_local_folder(tmp_path):
    filesystem, path = storage.arrow_filesystem(f"file://{tmp_path}")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    assert path == str(tmp_path)


def test_azure_without_an_account_is_said(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StorageError, match=r"cannot open az://box: .*AZURE_STORAGE_ACCOUNT_NAME"):
        storage.read_bytes("az://box/x")


def test_google_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    identity.forget()
    with pytest.raises(StorageError, match=r"gs://box does not answer \(no connection; \d+ tries"):
        storage.read_bytes("gs://box/x", patience_s=1)


class Blobs(http.server.BaseHTTPRequestHandler):
    """Objects in memory behind as much of Azure's interface as one client uses."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes] = {}  # noqa: RUF012  (each request has a handler of its own; they share this)

    def log_message(self, format, *args):
        pass

    def do_PUT(self):
        self.objects[self.key()] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201, b"", headers={"ETag": '"e"'})

    def do_POST(self):  # a batch of deletions
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        parts = ""
        for number, path in enumerate(re.findall(r"DELETE (\S+) HTTP", asked)):
            found = self.objects.pop(self.key(path), None)
            status = "404 Not Found" if found is None else "202 Accepted"
            parts += (
                "--batch\r\nContent-Type: application/http\r\n"
                f"Content-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\nx-ms-version: 1\r\n\r\n"
            )
        content = f"{parts}--batch--\r\n".encode()
        headers = {"Content-Type": "multipart/mixed; boundary=batch"}
        self.answer(202, content, headers=headers)

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        if query.get("comp") == ["list"]:
            self.answer(200, self.listing(query))
            return
        content = self.objects.get(self.key())
        if content is None:
            self.answer(404, b"<Error><Code>BlobNotFound</Code></Error>")
            return
        size = len(content)
        headers = {"ETag": '"e"', "Last-Modified": "Tue, 24 Nov 2026 01:00:00 GMT"}
        asked = self.headers.get("x-ms-range") or self.headers.get("Range")
        if asked:
            first, last = (int(n) for n in re.findall(r"\d+", asked))
            content = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        self.answer(206 if asked else 200, content, headers=headers)

    do_HEAD = do_GET

    def key(self, path=""):
        return (
            unquote(urlsplit(path or self.path).path).removeprefix("/account").removeprefix("/box/")
        )

    def listing(self, query):
        prefix = query.get("prefix", [""])[0]
        names = sorted(name for name in self.objects if name.startswith(prefix))
        folders = set()
        if "delimiter" in query:
            below = {n: n[len(prefix) :].partition("/") for n in names}
            folders = {prefix + head + "/" for head, slash, _ in below.values() if slash}
            names = [n for n in names if not below[n][1]]
        blobs = "".join(
            f"<Blob><Name>{n}</Name><Properties><Last-Modified>Tue, 24 Nov 2026 01:00:00 GMT"
            f"</Last-Modified><Content-Length>{len(self.objects[n])}</Content-Length><Content-Type>"
            "x</Content-Type><Etag>e</Etag></Properties></Blob>"
            for n in names
        )
        blobs += "".join(f"<BlobPrefix><Name>{f}</Name></BlobPrefix>" for f in sorted(folders))
        return (
            '<?xml version="1.0"?><EnumerationResults ContainerName="box"><Blobs>'
            f"{blobs}</Blobs><NextMarker/></EnumerationResults>"
        ).encode()

    def answer(self, status, content, *, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def azure(monkeypatch):
    """Return the URI of an empty container."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blobs)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/account"
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ENDPOINT": url,
        "AZURE_SKIP_SIGNATURE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    identity.forget()
    Blobs.objects.clear()
    yield "az://box"
    server.shutdown()
    server.server_close()
    identity.forget()


@pytest.fixture
def google(monkeypatch, s3, faulty_s3):
    """Return the URI of a bucket of the S3 server, spoken to as Google's, tokens left out."""
    faulty_s3.faults.unsigned = True
    account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    account["gcs_base_url"] = faulty_s3.endpoint
    monkeypatch.setenv("GOOGLE_BASE_URL", faulty_s3.endpoint)
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    with environment(s3.env):
        bucket = s3.make_bucket(PUBLIC_BUCKET)
    yield bucket.replace("s3://", "gs://")
    identity.forget()


@pytest.fixture(params=["azure", pytest.param("google", marks=pytest.mark.slow)])
def root(request):
    """Return the URI of an empty folder."""
    return request.getfixturevalue(request.param)


def test_another_cloud_is_read_and_written_like_the_rest(root, tmp_path):
    uri = f"{root}/t/a/1.bin"
    assert not storage.exists(uri)
    content = bytes(range(256)) * 10_000
    for name in ("t/b.bin", "t/a/1.bin", "t/a/2.bin", "t/c/d/3.bin"):
        storage.write_atomic(f"{root}/{name}", content)
    assert storage.read_bytes(uri) == content
    assert storage.size(uri) == len(content)
    ranges = [(5, 9), (2_000_000, 2_000_003)]
    got = storage.read_ranges(uri, ranges, etag=storage.etag(uri), size=len(content))
    assert [bytes(g) for g in got] == [content[a:b] for a, b in ranges]
    tag = storage.etag(f"{root}/t/b.bin")
    entries = [Entry("a", True, 0), Entry("b.bin", False, len(content), tag), Entry("c", True, 0)]
    assert list(storage.list_folder(f"{root}/t")) == entries
    names = [entry.name for entry in storage.list_tree(f"{root}/t")]
    assert names == ["a/1.bin", "a/2.bin", "b.bin", "c/d/3.bin"]
    later = [entry.name for entry in storage.list_tree(f"{root}/t", after="a/2.bin")]
    assert later == names[2:]
    storage.download(uri, tmp_path / "down" / "1.bin")
    storage.upload(tmp_path / "down" / "1.bin", f"{root}/t/up.bin")
    assert storage.read_bytes(f"{root}/t/up.bin") == content
    for line in (b"one\n", b"two\n", b"two\n"):
        storage.append(f"{root}/t/log", line)
    assert storage.read_bytes(f"{root}/t/log") == b"one\ntwo\ntwo\n"
    storage.check_writable(root)
    storage.delete_file(uri)
    storage.delete_file(uri)
    with pytest.raises(storage.MissingError, match=f"cannot read {uri}: there is no such"):
        storage.read_bytes(uri)
    storage.delete_folder(f"{root}/t")
    assert list(storage.list_tree(root)) == []
