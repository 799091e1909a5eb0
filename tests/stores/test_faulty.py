"""Reading through the fault proxy: nothing lost, bytes equal, polite, and said in one sentence."""

import logging
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from faults import Faults
from s3 import SPARE_KEYS, environment

from orchestrator import storage

pytestmark = pytest.mark.slow
SHARD_BYTES = 8_000_000


@pytest.fixture
def shard(faulty_s3):
    """Return the URI and the content of an object of 8 MB."""
    content = np.random.default_rng(0).bytes(SHARD_BYTES)
    uri = f"{faulty_s3.upstream.make_bucket('faulty')}/{time.time_ns()}/shard.parquet"
    storage.write_atomic(uri, content)
    assert storage.size(uri) == len(content)  # from now on this process is patient
    return uri, content


def read_all(shard, *, num_spans=400, threads=8):
    """Read random spans in threads; return how many differ from the content."""
    uri, content = shard
    draws = random.Random(3)
    starts = [draws.randrange(SHARD_BYTES - 30_000) for _ in range(num_spans)]

    def differs(start):
        (got,) = storage.read_ranges(uri, [(start, start + 30_000)])
        return bytes(got) != content[start : start + 30_000]

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(differs, starts))


def test_a_storm_loses_nothing_and_is_polite(faulty_s3, shard, monkeypatch):  # R26
    before, sent = storage.traffic(), len(faulty_s3.log)
    faulty_s3.faults = Faults(refuse=0.2, cut=0.1, stall=0.01, stall_s=7)
    assert read_all(shard) == 0
    traffic = storage.traffic()
    requests = len(faulty_s3.log) - sent
    assert requests <= 2 * 400
    assert traffic.requests - before.requests == requests
    assert traffic.retries - before.retries == requests - 400
    assert traffic.bytes - before.bytes == 400 * 30_000
    assert traffic.waited_s > before.waited_s
    faults = [request.fault for request in faulty_s3.log[sent:]]
    assert {"refuse", "cut", "stall", ""} == set(faults)


def test_an_outage_is_waited_for_and_said(faulty_s3, shard, caplog):  # R27, at 14 s
    uri, content = shard
    faulty_s3.faults.outage = True
    threading.Timer(14, setattr, (faulty_s3.faults, "outage", False)).start()
    sent, started = len(faulty_s3.log), time.monotonic()
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: storage.read_ranges(uri, [(i, i + 9)])[0], range(4)))
    assert [bytes(g) for g in got] == [content[i : i + 9] for i in range(4)]
    assert 14 <= time.monotonic() - started < 25
    lines = [r.getMessage() for r in caplog.records if "does not answer" in r.getMessage()]
    assert 1 <= len(lines) <= 2
    assert f"{uri.rpartition('/')[0]} at the endpoint {faulty_s3.endpoint}" in lines[0]
    assert "next try in" in lines[0]
    assert len(faulty_s3.log) - sent < 4 * 20


def test_patience_has_an_end(faulty_s3, shard):
    faulty_s3.faults.outage = True
    with pytest.raises(storage.OutageError, match=r"does not answer \(the connection broke; \d+ t"):
        storage.read_ranges(shard[0], [(0, 9)], patience_s=2)


def test_gone_and_denied_are_said_at_once(faulty_s3, shard):  # R28
    uri, _ = shard
    sent, started = len(faulty_s3.log), time.monotonic()
    faulty_s3.faults.missing = "shard"
    with pytest.raises(storage.MissingError, match=f"cannot read {uri}: there is no such"):
        storage.read_ranges(uri, [(0, 9)])
    faulty_s3.faults = Faults(denied="shard")
    with pytest.raises(storage.DeniedError, match="403 AccessDenied") as error:
        storage.read_ranges(uri, [(0, 9)])
    assert not isinstance(error.value, storage.LockedOutError)
    assert len(faulty_s3.log) - sent == 2
    assert time.monotonic() - started < 2


def test_denied_everywhere_stops_and_names_the_identity(faulty_s3, shard):  # R28
    faulty_s3.faults.denied = ""
    started = time.monotonic()
    errors = []
    while time.monotonic() - started < 30:
        try:
            storage.read_ranges(shard[0], [(0, 9)])
        except storage.LockedOutError as error:
            errors.append(str(error))
            break
        except storage.DeniedError:
            continue
    assert "check the credentials or bucket policy" in errors[0]
    assert f"access key {faulty_s3.env['AWS_ACCESS_KEY_ID'][:4]}..." in errors[0]
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert faulty_s3.env[secret] not in errors[0]
    faulty_s3.faults.denied = None
    assert len(storage.read_ranges(shard[0], [(0, 9)])) == 1


def test_expired_credentials_are_renewed(faulty_s3, shard, tmp_path, monkeypatch):  # R29
    """Keys live for 5 s and come from a `credential_process` in the profile."""
    script = tmp_path / "credentials.py"
    script.write_text(
        "import datetime as d, json, time\n"
        "slot = int(time.time() // 5)\n"
        f"key, secret = {SPARE_KEYS!r}[slot % {len(SPARE_KEYS)}]\n"
        "end = d.datetime.fromtimestamp(slot * 5 + 5, d.timezone.utc).isoformat()\n"
        "print(json.dumps(dict(Version=1, AccessKeyId=key, SecretAccessKey=secret,"
        " Expiration=end)))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    def expired(access_key):
        return access_key != SPARE_KEYS[int(time.time() // 5) % len(SPARE_KEYS)][0]

    uri, content = shard
    with environment({"AWS_CONFIG_FILE": str(config)}):
        faulty_s3.faults.expired = expired
        end = time.monotonic() + 12
        while time.monotonic() < end:
            assert bytes(storage.read_ranges(uri, [(5, 50)])[0]) == content[5:50]
            time.sleep(0.2)
    keys = {request.access_key for request in faulty_s3.log if request.status == 206}
    assert len(keys & {key for key, _ in SPARE_KEYS}) >= 3


def test_keys_replaced_in_a_file_are_found(faulty_s3, shard, tmp_path, monkeypatch):  # R29
    """Nothing says that these keys expire: the refusal makes the chain be asked again."""
    uri, content = shard
    file = tmp_path / "credentials"

    def write(number):
        key, secret = SPARE_KEYS[number]
        file.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    write(0)
    with environment({"AWS_SHARED_CREDENTIALS_FILE": str(file)}):
        assert bytes(storage.read_ranges(uri, [(5, 50)])[0]) == content[5:50]
        faulty_s3.faults.expired = lambda access_key: access_key == SPARE_KEYS[0][0]
        threading.Timer(2, write, (1,)).start()
        assert bytes(storage.read_ranges(uri, [(6, 60)])[0]) == content[6:60]


def test_a_changed_object_is_not_read(faulty_s3, shard):  # R30
    uri, content = shard
    etag = storage.etag(uri)
    assert len(storage.read_ranges(uri, [(0, 9)], etag=etag, size=SHARD_BYTES)) == 1
    storage.write_atomic(uri, content[:-1] + b"x")
    with pytest.raises(storage.ChangedError, match="not the object that was indexed"):
        storage.read_ranges(uri, [(0, 9)], etag=etag)
    storage.write_atomic(uri, content[:-1])
    with pytest.raises(storage.ChangedError, match=f"{SHARD_BYTES - 1} bytes but the index says"):
        storage.read_ranges(uri, [(0, 9)], size=SHARD_BYTES)


def test_a_flipped_byte_arrives_flipped(faulty_s3, shard):  # R31: only a checksum finds it
    uri, content = shard
    faulty_s3.faults.flip = 1.0
    (got,) = storage.read_ranges(uri, [(0, 1000)])
    assert sum(a != b for a, b in zip(bytes(got), content, strict=False)) == 1


def test_the_rate_halves_after_a_burst_and_climbs_again(faulty_s3, shard):  # R32
    uri, _ = shard
    stop, log = threading.Event(), faulty_s3.log

    def read():
        while not stop.is_set():
            storage.read_ranges(uri, [(0, 9)])

    def rate(seconds):
        start = len(log)
        time.sleep(seconds)
        return (len(log) - start) / seconds

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        before = rate(3)
        faulty_s3.faults.refuse = 1.0
        time.sleep(4)
        during = rate(1)
        faulty_s3.faults.refuse = 0.0
        time.sleep(5)
        soon = rate(2)
        time.sleep(12)
        later = rate(2)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert during < before / 2
    assert during < soon < later


def test_near_ranges_cost_one_request(faulty_s3, shard):
    sent = len(faulty_s3.gets())
    storage.read_ranges(shard[0], [(i, i + 100_000) for i in range(0, 6_000_000, 200_000)])
    assert len(faulty_s3.gets()) - sent == 1


def test_a_forked_process_reads_too(faulty_s3, shard):
    uri, content = shard
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = bytes(storage.read_ranges(uri, [(5, 50)])[0]) != content[5:50]
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_odd_keys_are_read(faulty_s3):
    bucket = faulty_s3.upstream.make_bucket("faulty")
    for number, name in enumerate(["a b%20c#d?e=f&g+h", "'[x]*~\\|", "ü/ö", "double//slash"]):
        storage.write_atomic(f"{bucket}/odd/{name}", bytes([number]))
        assert storage.read_bytes(f"{bucket}/odd/{name}") == bytes([number])
        assert storage.size(f"{bucket}/odd/{name}") == 1
