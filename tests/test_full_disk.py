"""A local disk that takes nothing more: /dev/full, and files that may not grow (EFBIG)."""

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from packed import write_packed

from orchestrator import storage
from orchestrator.cli import main
from orchestrator.run import append_event
from orchestrator.storage import StorageError
from orchestrator.train.recovery.failures import Verdict
from orchestrator.train.recovery.mistakes import record_failure
from orchestrator.train.saving import lease


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow, as a quota or a full disk does; root is no exception."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_storage_path_that_takes_nothing_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_packed(tmp_path / "data", train=40, val=8)
    flags = {"name": "run", "storage_path": f"{tmp_path}/runs", "data.index": index.uri}
    flags |= {"data.global_batch": "8", "data.image_size": "8"}
    given = [part for key, value in flags.items() for part in (f"--{key}", value)]
    with full_disk():
        assert main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {tmp_path}/runs/run/lease-000001.json: File too l")
    assert said.endswith("; check the file system, or choose another path.\n")
    assert not ray.is_initialized()
    assert list((tmp_path / "runs" / "run").iterdir()) == []


def test_a_full_disk_is_found_though_it_takes_empty_files(tmp_path: Path) -> None:
    refused = pytest.raises(StorageError, match=r"cannot write .*\.probe-.*: File too large; check")
    with full_disk(), refused:
        storage.check_writable(str(tmp_path))


def test_a_failure_that_cannot_be_written_down_is_survived(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    record_failure(str(tmp_path), "gone", cause="process", step=3, verdict=Verdict(1, ""))
    with pytest.raises(StorageError, match=r"cannot write .*events\.jsonl: the disk is full; free"):
        append_event(str(tmp_path), "training", step=3)


def test_an_archive_that_is_damaged_is_no_fault_of_the_disk() -> None:
    error = OSError("CRC check failed")
    with pytest.raises(OSError, match="CRC") as caught, storage.explained("x", "read"):
        raise error
    assert caught.value is error


def test_the_heart_goes_on_once_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    run = tmp_path / "run"
    with lease.held(str(run)):
        with full_disk():
            time.sleep(0.5)
        began = time.time()
        time.sleep(0.5)
        assert json.loads((run / "lease-000001.json").read_text())["beat"] > began
