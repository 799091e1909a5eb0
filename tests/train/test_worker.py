"""Which checkpoint the workers of a start go on from: worker 0 says it. No Ray."""

import shutil
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from saves import make_manifest

from orchestrator.run import read_events
from orchestrator.storage import StorageError
from orchestrator.train import worker
from orchestrator.train.saving import checkpoint, lease


class Said(list[str]):
    """Stands for the board's handle."""

    @property
    def say(self) -> Any:
        return types.SimpleNamespace(remote=self.append)


def find(
    run: Path, folder: Path, *, rank: int, told: Any = None, later: bool = False
) -> tuple[Any, Said, list[Any]]:
    """Let a worker find its checkpoint.

    Args:
        run: the run's folder.
        folder: where its files go.
        rank: the worker.
        told: what worker 0 tells the others.
        later: whether a later start has the run meanwhile.
    """
    said, sent = Said(), []

    def broadcast(value: Any) -> Any:
        sent.append(value)
        return value if rank == 0 else told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "broadcast_from_rank_zero", broadcast)
        patch.setattr(worker, "_PAUSES_S", (0.1, 0.2, 0.4))
        with lease.held(str(run)) as mine:
            token = mine.renew()
            if later:
                mine.renew()
            job: Any = types.SimpleNamespace(run=str(run), board=said, lease=token)
            return worker._find_checkpoint(job, folder, rank), said, sent


def save(run: Path, scratch: Path, step: int) -> Path:
    scratch.mkdir(exist_ok=True)
    (scratch / "weights.pt").write_bytes(b"x" * step)
    folder = checkpoint.checkpoint_uri(str(run), step)
    files = tuple(checkpoint.store_files(scratch, folder))
    checkpoint.commit(str(run), make_manifest(step, files=files))
    return Path(folder)


def test_worker_0_falls_back_tells_the_others_and_says_so(tmp_path: Path) -> None:
    save(tmp_path / "run", tmp_path / "scratch", 4)
    (save(tmp_path / "run", tmp_path / "scratch", 8) / "weights.pt").write_bytes(b"y" * 8)
    found, said, sent = find(tmp_path / "run", tmp_path / "0", rank=0)
    assert (found.step, sent) == (4, [4])
    (line,) = said
    assert line.endswith("checksum of its manifest; going on from the checkpoint of step 4")
    (event,) = read_events(str(tmp_path / "run"))
    assert event["event"] == "checkpoint_refused"
    assert not Path(checkpoint.checkpoint_uri(str(tmp_path / "run"), 8)).exists()
    found, _, _ = find(tmp_path / "run", tmp_path / "1", rank=1, told=4)
    assert found.step == 4
    assert (tmp_path / "1" / "weights.pt").read_bytes() == b"xxxx"


def test_a_worker_that_sees_a_folder_late_waits_for_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", tmp_path / "scratch", 4)
    shutil.move(folder, tmp_path / "not yet")
    shown = threading.Timer(0.2, shutil.move, (tmp_path / "not yet", folder))
    shown.start()
    assert find(tmp_path / "run", tmp_path / "1", rank=1, told=4)[0].step == 4
    shown.join()


def test_a_worker_that_never_sees_it_is_a_failure_of_storage(tmp_path: Path) -> None:
    save(tmp_path / "run", tmp_path / "scratch", 4)
    with pytest.raises(
        StorageError, match=r"worker 1 cannot .* step 8 that worker 0 reads \(.*; c"
    ):
        find(tmp_path / "run", tmp_path / "1", rank=1, told=8)


def test_where_a_later_start_has_the_run_nothing_of_its_is_deleted(tmp_path: Path) -> None:
    kept = save(tmp_path / "run", tmp_path / "scratch", 4)
    under_way = tmp_path / "run" / "checkpoints" / "step-00000008" / "weights.pt"
    under_way.parent.mkdir()
    under_way.touch()
    with pytest.raises(lease.LeaseLostError, match="later workers of the same driver"):
        find(tmp_path / "run", tmp_path / "0", rank=0, later=True)
    assert kept.exists()
    assert under_way.exists()
    find(tmp_path / "run", tmp_path / "0", rank=0)
    assert not under_way.exists()


def test_a_run_without_a_checkpoint_starts_at_its_first_step(tmp_path: Path) -> None:
    assert find(tmp_path / "run", tmp_path / "0", rank=0)[0] is None
    assert find(tmp_path / "run", tmp_path / "1", rank=1)[0] is None
