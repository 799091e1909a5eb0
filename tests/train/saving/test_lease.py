"""One driver at a time: real processes, real kills, a local folder and a bucket."""

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import saves
from packed import write_packed
from s3 import S3Server

from orchestrator import storage
from orchestrator.cli import main
from orchestrator.config import UserError
from orchestrator.storage import StorageError
from orchestrator.train.saving import checkpoint, groups, lease

HOLD = """
import sys, time
from orchestrator.train.saving import lease
with lease.held(sys.argv[1]) as mine:
    print(mine.renew(), flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    server: S3Server = request.getfixturevalue("s3")
    return f"{server.make_bucket('leases')}/{tmp_path.name}"


def leases(run: str) -> list[str]:
    return [e.name for e in storage.list_folder(run) if e.name.startswith("lease-")]


def on_another_machine(run: str, **changes: object) -> None:
    """Write a lease as a driver on another machine would."""
    now = time.time()
    holder = lease.Holder(
        driver="07e5", start=1, host="far", machine="boot pid:[1]", pid=7, born="1",
        since=now, beat=now,
    )  # fmt: skip
    content = json.dumps(dataclasses.asdict(holder) | changes)
    storage.write_atomic(storage.join(run, "lease-000004.json"), content.encode())


def test_the_second_driver_is_told_who_has_the_run(run: str) -> None:
    with lease.held(run) as mine:
        lease.check(run, mine.renew())
        pid, host = os.getpid(), socket.gethostname()
        said = rf"trained by process {pid} on {host} \(last sign of life \d+ s ago\); end that"
        with pytest.raises(UserError, match=said), lease.held(run):
            pass
    assert leases(run) == []


def test_a_killed_driver_does_not_block_the_next(run: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        token = child.stdout.readline().strip()
        lease.check(run, token)
        with pytest.raises(UserError, match=f"process {child.pid} on"), lease.held(run):
            pass
        child.send_signal(signal.SIGKILL)
        # Its parent has not looked yet: it is a zombie, and dead all the same.
        time.sleep(0.2)
        began = time.monotonic()
        with lease.held(run):
            assert time.monotonic() - began < 5
            with pytest.raises(lease.LeaseLostError, match=f"process {os.getpid()} on"):
                lease.check(run, token)
    with pytest.raises(lease.LeaseLostError, match="ended by its driver"):
        lease.check(run, token)


def test_a_finished_run_forgets_a_driver_that_was_killed_and_no_other(run: str) -> None:
    with lease.held(run):
        lease.clear(run)
        assert len(leases(run)) == 1
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
    assert len(leases(run)) == 1
    lease.clear(run)
    assert leases(run) == []


def test_workers_of_an_earlier_start_no_longer_commit(run: str) -> None:
    with lease.held(run) as mine:
        first, second = mine.renew(), mine.renew()
        lease.check(run, second)
        with pytest.raises(lease.LeaseLostError):
            lease.check(run, first)


def test_what_is_left_of_a_dead_drivers_workers_changes_nothing(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with lease.held(run) as mine:
        worker = saves.Worker(run, check_lease=functools.partial(lease.check, run, mine.renew()))
        worker.consume(1)
        worker.save(1, last=True)
        mine.renew()
        # What the later start has there by now, under the same name.
        theirs = Path(checkpoint.checkpoint_uri(run, 2)) / "weights.safetensors"
        theirs.parent.mkdir()
        theirs.write_text("theirs")
        worker.consume(2)
        with pytest.raises(lease.LeaseLostError, match="later workers of the same driver train"):
            worker.save(2, last=True)
        worker.committer.close(10)
    assert [path.read_text() for path in theirs.parent.iterdir()] == ["theirs"]
    assert [manifest.step for manifest in checkpoint.list_manifests(run)] == [1]


def test_workers_of_an_earlier_group_no_longer_commit(run: str) -> None:
    with lease.held(run) as mine:
        start = mine.renew()
        assert groups.token_of(run, start) == start  # none was announced
        groups.announce(run, start, "first")
        first = groups.token_of(run, start)
        lease.check(run, first)
        groups.announce(run, start, "second")
        lease.check(run, groups.token_of(run, start))
        with pytest.raises(lease.LeaseLostError, match="later workers of the same driver train"):
            lease.check(run, first)
    assert list(storage.list_folder(run)) == []


def test_a_driver_that_lost_the_run_leaves_the_next_ones_workers_alone(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with lease.held(run) as mine:
        groups.announce(run, mine.renew(), "mine")
        on_another_machine(run)  # it has taken over
        groups.announce(run, "07e5-1", "theirs")
        lease.check(run, "07e5-1/theirs")
        with pytest.raises(lease.LeaseLostError, match="taken over by process 7 on far"):
            mine.renew()
    lease.check(run, "07e5-1/theirs")
    names = {entry.name for entry in storage.list_folder(run)}
    assert names == {"lease-000004.json", "workers-07e5-1.txt"}


def test_a_save_that_failed_deletes_nothing_of_a_later_start(tmp_path: Path) -> None:
    run, checks = str(tmp_path / "run"), iter([True, False])

    def check() -> None:
        if not next(checks, False):
            raise lease.LeaseLostError("later workers train it")

    theirs = Path(checkpoint.checkpoint_uri(run, 2)) / "theirs"
    in_the_way = Path(run, "samples", "step-00000002", "rank-00000.parquet")
    for folder in (theirs.parent, in_the_way):
        folder.mkdir(parents=True)
    theirs.touch()
    worker = saves.Worker(run, check_lease=check)
    worker.consume(2)
    with pytest.raises((lease.LeaseLostError, checkpoint.CheckpointError)):
        worker.save(2, last=True)
    worker.committer.close(10)
    assert theirs.exists()


def test_of_many_drivers_one_wins(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads stand in for processes: which of them creates the lease is up to storage.
    monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    on_another_machine(run)
    start, winners, told = threading.Barrier(6), [], []

    def drive() -> None:
        start.wait()
        try:
            with lease.held(run) as mine:
                winners.append(mine)
                over.wait(10)
        except UserError as error:
            told.append(str(error))

    over = threading.Event()
    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(winners) + len(told) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    over.set()
    for thread in threads:
        thread.join()
    assert (len(winners), len(told)) == (1, 5)


def test_a_silent_driver_elsewhere_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path / "run")
    monkeypatch.setattr(lease, "EXPIRES_S", 1.0)
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    # Its clock may be hours behind ours: that says nothing about whether it lives.
    on_another_machine(run, beat=time.time() - 1e5)
    began = time.monotonic()
    with lease.held(run):
        assert 0.9 < time.monotonic() - began < 5
    assert "waiting up to 1 s to see whether it still lives" in caplog.text


@pytest.mark.parametrize("content", [b"", b'{"driver": "x', b"{}", b"[]", b"\xff"])
def test_a_damaged_lease_blocks_nobody_for_long(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    run = str(tmp_path / "run")
    monkeypatch.setattr(lease, "EXPIRES_S", 0.2)
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    storage.write_atomic(f"{run}/lease-000003.json", content)
    storage.write_atomic(f"{run}/lease-7.json", b"somebody's own")
    with lease.held(run) as mine:
        lease.check(run, mine.renew())
        assert set(leases(run)) == {"lease-000004.json", "lease-7.json"}
    assert "unknown machine (its lease is damaged)" in caplog.text


def test_a_driver_mends_its_damaged_lease(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with lease.held(run) as mine:
        token = mine.renew()
        storage.write_atomic(f"{run}/lease-000001.json", b"")
        with pytest.raises(StorageError, match=r"lease-000001\.json is damaged"):
            lease.check(run, token)
        lease.check(run, mine.renew())


def test_a_living_driver_elsewhere_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    monkeypatch.setattr(lease, "_LOOK_S", 0.05)
    on_another_machine(run, beat=time.time() - 1e5)
    beat = threading.Timer(0.3, on_another_machine, (run,))
    beat.start()
    with pytest.raises(UserError, match="process 7 on far"), lease.held(run):
        pass
    beat.join()


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    run = str(tmp_path / "run")
    with lease.held(run) as mine:
        token = mine.renew()
        before = json.loads((tmp_path / "run" / "lease-000001.json").read_text())["beat"]
        time.sleep(0.5)
        assert json.loads((tmp_path / "run" / "lease-000001.json").read_text())["beat"] > before
        lease.check(run, token)


def test_the_second_driver_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_packed(tmp_path / "data", train=40, val=8)
    flags = {"name": "run", "storage_path": str(tmp_path), "data.index": index.uri}
    flags |= {"data.global_batch": "8", "data.image_size": "8"}
    given = [part for key, value in flags.items() for part in (f"--{key}", value)]
    with lease.held(str(tmp_path / "run")):
        assert main(["train", *given]) == 2
    assert f"is being trained by process {os.getpid()} on" in capsys.readouterr().err
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()
