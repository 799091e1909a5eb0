import errno
import os
import threading
import time
from pathlib import Path

import botocore.exceptions
import pytest
from s3 import environment, free_ports

from orchestrator import storage
from orchestrator.storage import Entry, StorageError


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request, tmp_path):
    """Return an empty folder, once on disk and once in a bucket."""
    if request.param == "local":
        return str(tmp_path)
    bucket = request.getfixturevalue("s3").make_bucket("storage-tests")
    return storage.join(bucket, tmp_path.name, str(time.time_ns()))


def put(root, *names, content=b"abc"):
    for name in names:
        storage.write_atomic(storage.join(root, name), content)


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("s3://b", "a", "c"), "s3://b/a/c"),
        (("s3://b/", "/a/"), "s3://b/a"),
        (("/x", "a/b"), "/x/a/b"),
    ],
)
def test_join(parts, joined):
    assert storage.join(*parts) == joined


def test_absolute_names_one_place_for_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == f"{tmp_path.resolve()}/runs"
    assert storage.absolute(f"file://{tmp_path}/runs/") == f"{tmp_path.resolve()}/runs"
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"


def test_another_scheme_is_refused():
    with pytest.raises(StorageError, match="the scheme 'hdfs' is not supported; use s3://, gs://"):
        storage.read_bytes("hdfs://bucket/x")


def test_what_is_written_is_read(root):
    uri = storage.join(root, "a/b.bin")
    assert not storage.exists(uri)
    put(root, "a/b.bin")
    assert storage.read_bytes(uri) == b"abc"
    assert storage.size(uri) == 3
    put(root, "a/b.bin", content=b"other")
    assert storage.read_bytes(uri) == b"other"
    with storage.open_input(uri) as file:
        file.seek(2)
        assert file.read(2) == b"he"
    assert not storage.exists(storage.join(root, "a"))


def test_files_travel_both_ways(root, tmp_path):
    source, target = tmp_path / "source.bin", tmp_path / "deep" / "target.bin"
    source.write_bytes(os.urandom(2 << 20))
    uri = storage.join(root, "x/copy.bin")
    storage.upload(source, uri)
    storage.download(uri, target)
    assert target.read_bytes() == source.read_bytes()


def test_a_folder_is_listed_by_name_and_a_tree_with_all_below(root):
    put(root, "t/b.txt", "t/a/2.txt", "t/a/1.txt", "t/c/d/3.txt")
    folder = storage.join(root, "t")
    entries = list(storage.list_folder(folder))
    assert [entry[:3] for entry in entries] == [("a", True, 0), ("b.txt", False, 3), ("c", True, 0)]
    listed = {f"t/{entry.name}": entry.etag for entry in storage.list_tree(folder)}
    assert listed["t/b.txt"] == entries[1].etag
    assert listed == {name: storage.etag(storage.join(root, name)) for name in listed}
    tree = [entry.name for entry in storage.list_tree(folder)]
    assert tree == ["a/1.txt", "a/2.txt", "b.txt", "c/d/3.txt"]
    assert list(storage.list_folder(storage.join(root, "missing"))) == []
    assert list(storage.list_tree(storage.join(root, "missing"))) == []


def test_deleting_twice_is_fine(root):
    put(root, "d/1", "d/e/2", "kept")
    storage.delete_folder(storage.join(root, "d"))
    storage.delete_folder(storage.join(root, "d"))
    assert [entry.name for entry in storage.list_tree(root)] == ["kept"]
    storage.delete_file(storage.join(root, "kept"))
    storage.delete_file(storage.join(root, "kept"))
    assert list(storage.list_tree(root)) == []


def test_the_probe_for_writing_leaves_nothing(root):
    storage.check_writable(storage.join(root, "new"))
    assert list(storage.list_tree(root)) == []


def test_a_missing_file_is_named(root):
    uri = storage.join(root, "not/there.bin")
    with pytest.raises(StorageError, match=f"cannot read {uri}: there is no such"):
        storage.read_bytes(uri)


def test_a_reader_never_sees_half_a_file(tmp_path):
    uri = str(tmp_path / "file")
    contents = {bytes([i]) * 200_000 for i in range(2)}
    storage.write_atomic(uri, bytes([0]) * 200_000)
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            seen.add(storage.read_bytes(uri))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(200):
        storage.write_atomic(uri, bytes([i % 2]) * 200_000)
    stop.set()
    reader.join()
    assert seen <= contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_in_the_way_is_named(tmp_path):
    Path(tmp_path, "file").write_text("x")
    with pytest.raises(StorageError, match="a file lies where a folder is needed"):
        storage.write_atomic(str(tmp_path / "file" / "x"), b"")


def test_a_link_to_nothing_is_listed(tmp_path):
    Path(tmp_path, "link").symlink_to("nothing")
    assert list(storage.list_folder(str(tmp_path))) == [Entry("link", False, 0)]


@pytest.mark.slow
def test_a_missing_bucket_is_named(s3):
    with pytest.raises(StorageError, match=r"cannot list s3://not-there: there is no such bucket"):
        list(storage.list_folder("s3://not-there"))
    with pytest.raises(StorageError, match=r"cannot write s3://not-there/x: there is no such"):
        storage.write_atomic("s3://not-there/x", b"")


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named(s3, variable):
    bucket = s3.make_bucket("storage-tests")
    with environment({variable: "wrong"}):
        for action in (storage.read_bytes, storage.size, storage.check_writable):
            with pytest.raises(StorageError, match=r"the credentials are wrong or lack the right"):
                action(f"{bucket}/x")
        with pytest.raises(StorageError, match=r"AWS_SECRET_ACCESS_KEY and the bucket's policy"):
            list(storage.list_folder(bucket))


@pytest.mark.slow
def test_no_credentials_are_named(s3, monkeypatch, tmp_path):
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    nothing = str(tmp_path / "nothing")
    files = {"AWS_SHARED_CREDENTIALS_FILE": nothing, "AWS_CONFIG_FILE": nothing}
    with (
        environment({**files, "AWS_EC2_METADATA_DISABLED": "true"}),
        pytest.raises(StorageError, match=r"there are no credentials; set AWS_ACCESS_KEY_ID"),
    ):
        storage.read_bytes("s3://bucket/key")


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:{port}", r"the endpoint http://127\.0\.0\.1:\d+ does not answer"),
        ("http://no-such-host.invalid", r"no-such-host\.invalid does not answer"),
        ("127.0.0.1:{port}", r"AWS_ENDPOINT_URL=127\.0\.0\.1:\d+ is no URL"),
    ],
)
def test_an_endpoint_that_does_not_answer_is_named_soon(endpoint, message):
    started = time.monotonic()
    url = endpoint.format(port=free_ports(1)[0])
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with environment({"AWS_ENDPOINT_URL": url, **keys}):
        with pytest.raises(StorageError, match=message):
            storage.read_bytes("s3://bucket/key")
        with pytest.raises(StorageError, match=message):
            storage.write_atomic("s3://bucket/key", b"")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBUSY, "Please reduce your request rate."),
        OSError(errno.EIO, "We encountered an internal error."),
        botocore.exceptions.ClientError({"Error": {"Code": "Odd", "Message": "odd"}}, "PutObject"),
    ],
)
def test_what_a_server_refuses_for_long_is_storages_error(error):
    with (
        pytest.raises(storage.StorageError, match=r"^cannot write s3://b/x: the server refuses \("),
        storage.explained("s3://b/x", "write"),
    ):
        raise error
