"""Checkpoints off the training thread: what they hold, and what happens where saving fails."""

import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import saves
import torch
from faults import FaultProxy
from saves import Meeting, Worker

from orchestrator.config import UserError
from orchestrator.run import read_events
from orchestrator.train.saving import checkpoint, commit, saver
from orchestrator.train.saving.checkpoint import CheckpointError
from orchestrator.train.strategies.tensors import read_weights

LARGE = 3 * 2**20  # floats: a state that is not waited for


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_LAST_PAUSES_S", (0.0, 0.0))


@pytest.fixture
def broken(run: str) -> Path:
    """Make it impossible to write checkpoints: a file lies where their folder belongs."""
    path = Path(run, "checkpoints")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def steps(run: str) -> list[int]:
    return [manifest.step for manifest in checkpoint.list_manifests(run)]


def fetched(run: str, folder: Path) -> dict[str, torch.Tensor]:
    checkpoint.fetch_newest(run, checkpoint.list_manifests(run), folder)
    return read_weights(folder)


def wait_for(worker: Worker, step: int) -> None:
    deadline = time.monotonic() + 60
    while worker.committer._saver.committed != step:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_changes_after_the_save_began_is_not_in_it(run: str, tmp_path: Path) -> None:
    worker = Worker(run)
    weights = torch.zeros(LARGE)
    hold = threading.Event()
    worker.committer._saver._background.submit(hold.wait)  # the save starts late
    for step in (1, 2):
        weights += 1
        state = saves.state_at(step)
        state["weights.safetensors"] = {"net.weight": weights}
        worker.committer.save(
            saves.make_manifest(step),
            capture=lambda state=state: state,
            consumed=worker.consumed,
        )
    hold.set()
    assert worker.committer.close(60)
    assert steps(run) == [1]  # the second fell due while the first was under way
    assert torch.equal(fetched(run, tmp_path / "to")["net.weight"], torch.ones(LARGE))
    assert worker.committer.totals["saves_skipped"] == 1


def test_what_cannot_be_read_again_is_refused_whenever_it_turns_up(run: str) -> None:
    class Custom:
        pass

    worker, kept = Worker(run), {"seen": [1]}

    def save(step: int) -> None:
        captured = {**saves.state_at(step), "trainer.pt": kept}
        point = saves.make_manifest(step)
        worker.committer.save(point, capture=lambda: captured, consumed=worker.consumed)

    save(1)
    kept["seen"].append(Custom())
    with pytest.raises(UserError, match=r"trainer\.pt holds more than tensors and primitives"):
        save(2)


def test_a_validation_waits_for_the_save_under_way_instead(run: str) -> None:
    worker = Worker(run, keep=9)
    for step in (1, 2, 3):
        worker.consume(step)
        assert worker.save(step, size=LARGE, must=True)
    worker.save(4, last=True)
    assert steps(run) == [1, 2, 3, 4]
    assert worker.committer.totals["saves_skipped"] == 0


def test_workers_agree_without_a_barrier_and_nothing_is_lost(run: str) -> None:
    saves.train(run, steps=9, every=2)
    saves.assert_complete(run, steps=9)


def test_a_record_of_an_earlier_start_does_not_count(run: str) -> None:
    alone = Meeting(saves.WORKERS)
    gathers = [alone.of(rank) for rank in range(2)]
    workers: list[Any] = [None, None]

    def make(rank: int) -> None:
        workers[rank] = Worker(run, rank, gathers[rank])

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    uri = checkpoint.checkpoint_uri(run, 4)
    stale = Path(uri) / "rank-00001.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"save": "other-1", "files": [], "bad": [], "failed": ""}')
    first = threading.Thread(target=workers[0].save, args=(4,), kwargs={"size": LARGE})
    first.start()
    time.sleep(0.5)
    assert steps(run) == []
    workers[1].save(4)
    first.join()
    wait_for(workers[0], 4)
    assert steps(run) == [4]


def test_a_failing_save_is_said_and_tried_again(run: str, broken: Path) -> None:
    worker = Worker(run)
    for step in range(1, 4):
        worker.consume(step, bad=[saves.BAD] if step == 1 else None)
        worker.save(step)
    assert steps(run) == []
    broken.unlink()
    worker.consume(4)
    worker.save(4, last=True)
    worker.committer.close(60)
    assert steps(run) == [4]
    failed = [event for event in read_events(run) if event["event"] == "checkpoint_failed"]
    assert [(event["step"], event["count"]) for event in failed] == [(1, 1), (2, 2), (3, 3)]
    assert "(3 in a row): StorageError: cannot write" in worker.lines[-1]
    assert worker.lines[-1].endswith("training goes on")
    # What the failed saves should have covered is covered by the one that went well.
    rows = pq.read_table(f"{run}/samples").to_pylist()
    assert sorted(row["step"] for row in rows) == [1, 2, 3, 4]
    assert pq.read_table(f"{run}/quarantine.parquet")["id"].to_pylist() == ["x"]
    assert checkpoint.list_manifests(run)[-1].stats["saves_failed"] == 3
    assert [e["id"] for e in read_events(run) if e["event"] == "quarantined"] == ["x"]


def test_many_bad_images_are_said_at_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(saver, "append_events", lambda run, events: said.append(len(events)))
    worker = Worker(run)
    worker.consume(1, bad=[{**saves.BAD, "uri": f"{i}.png"} for i in range(12_000)])
    worker.save(1, last=True)
    worker.committer.close(60)
    assert said == [12_000]


def test_after_max_age_without_a_checkpoint_the_run_fails(run: str, broken: Path) -> None:
    worker = Worker(run, max_age_s=0.3)
    worker.save(1)
    time.sleep(0.4)
    worker.save(2)  # one failure may be an accident, however long ago
    with pytest.raises(
        CheckpointError, match=r"train\.checkpoint\.max_age_s=0\.3 .*submit the"
    ) as e:
        worker.save(3)
    assert "\n" not in str(e.value)


@pytest.mark.usefixtures("no_pauses")
def test_a_last_save_that_fails_fails_the_run(run: str) -> None:
    worker = Worker(run)
    worker.save(1)
    shutil.rmtree(run)
    Path(run).mkdir()
    Path(run, "checkpoints").touch()
    message = (
        r"last checkpoint of .*, of step 2, could not be saved \(worker 0: .*go on from step 1"
    )
    with pytest.raises(CheckpointError, match=message):
        worker.save(2, last=True)
    assert len(worker.lines) == 3


def test_a_worker_that_cannot_write_does_not_hold_the_others(run: str) -> None:
    in_the_way = Path(run, "samples", "step-00000002", "rank-00001.parquet")
    (in_the_way / "folder").mkdir(parents=True)
    meeting = Meeting(2)
    workers: dict[int, Worker] = {}

    def work(rank: int) -> None:
        workers[rank] = worker = Worker(run, rank, meeting.of(rank))
        for step in range(1, 6):
            worker.consume(step)
            if step == 5 and rank == 1:
                shutil.rmtree(in_the_way)
            if step > 1:
                worker.save(step, must=True, last=step == 5)
        worker.committer.close(60)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps(run)[-1] == 5
    saves.assert_complete(run, steps=5)
    failed = [line.split(" failed")[0] for line in workers[0].lines]
    assert failed[:2] == ["checkpoint of step 2", "checkpoint of step 3"]
    assert all("worker 1: StorageError: cannot write" in line for line in workers[0].lines)


def test_a_file_that_the_system_refuses_leaves_nothing_behind(run: str) -> None:
    """As on a full disk: the write of a large file fails half-way."""
    worker = Worker(run)
    worker.save(1, size=LARGE)
    wait_for(worker, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    staged = worker.committer._saver._staging._root
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        worker.save(2, size=LARGE, must=True)
        worker.committer._attempt.over.wait(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint of step 2 failed (1 in a row)" in worker.lines[-1]
    assert not Path(checkpoint.checkpoint_uri(run, 2)).exists()
    assert [path.name for path in staged.iterdir()] == ["lock"]
    worker.save(3, size=LARGE, last=True)
    worker.committer.close(60)
    assert steps(run) == [1, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pauses")
def test_a_bucket_that_refuses_is_said_and_training_goes_on(
    faulty_s3: FaultProxy, tmp_path: Path
) -> None:
    run = f"{faulty_s3.upstream.make_bucket('refused-saves')}/run"
    worker = Worker(run)
    worker.consume(1)
    worker.save(1)
    wait_for(worker, 1)
    faulty_s3.faults.methods = ("GET", "HEAD", "PUT", "POST", "DELETE")
    faulty_s3.faults.denied = r"step-00000002"
    worker.consume(2)
    worker.save(2)
    worker.committer._attempt.over.wait(60)
    assert "403" in worker.lines[-1]
    faulty_s3.faults.denied = None
    worker.consume(3)
    worker.save(3, last=True)
    worker.committer.close(60)
    assert steps(run) == [1, 3]
    assert fetched(run, tmp_path / "to")["net.weight"][0] == 3
    assert [e["event"] for e in read_events(run)] == ["checkpoint_failed"]
