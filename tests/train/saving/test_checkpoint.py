"""When a checkpoint counts: commit, keep, best, damage, rewind."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest
from saves import make_manifest

from orchestrator.storage import MissingError
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import CheckpointError
from orchestrator.train.saving.rewinding import clear_unfinished, rewind


def save(run: str, tmp_path: Path, step: int, *, content: bytes = b"x", **changes: object) -> None:
    source = tmp_path / f"source-{step}"
    (source / "inner").mkdir(parents=True)
    (source / "weights.pt").write_bytes(content * step)
    (source / "inner" / "more.pt").write_bytes(b"more")
    files = checkpoint.store_files(source, checkpoint.checkpoint_uri(run, step))
    checkpoint.commit(run, make_manifest(step, files=tuple(files), **changes))


def steps(run: str) -> list[int]:
    return [manifest.step for manifest in checkpoint.list_manifests(run)]


def test_a_checkpoint_counts_once_its_manifest_is_written(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert steps(run) == []
    save(run, tmp_path, 4)
    checkpoint.store_files(tmp_path / "source-4", checkpoint.checkpoint_uri(run, 8))
    assert steps(run) == [4]
    assert checkpoint.list_manifests(run)[0].position == 40


def test_a_step_is_committed_once_and_amended_where_it_is(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    with pytest.raises(CheckpointError, match="is there already; another start has committed it"):
        checkpoint.commit(run, make_manifest(4, position=7))
    assert checkpoint.read_manifest(run, 4).position == 40
    checkpoint.amend(run, 4, done="converged")
    assert checkpoint.read_manifest(run, 4).done == "converged"
    checkpoint.delete(run, 4)
    with pytest.raises(MissingError):
        checkpoint.amend(run, 4, done="max_epochs")
    assert steps(run) == []


def test_files_come_back_whole(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    found, problems = checkpoint.fetch_newest(run, checkpoint.list_manifests(run), tmp_path / "to")
    assert (found.step, problems) == (4, [])
    assert (tmp_path / "to" / "weights.pt").read_bytes() == b"xxxx"
    assert (tmp_path / "to" / "inner" / "more.pt").read_bytes() == b"more"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, damage: str
) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    save(run, tmp_path, 8)
    path = Path(checkpoint.checkpoint_uri(run, 8)) / "weights.pt"
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(b"y" + path.read_bytes()[1:] if damage == "flip" else b"xx")
    found, problems = checkpoint.fetch_newest(run, checkpoint.list_manifests(run), tmp_path / "to")
    assert found.step == 4
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert (tmp_path / "to" / "weights.pt").read_bytes() == b"xxxx"


def test_without_a_whole_checkpoint_nothing_starts_from_scratch(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    (Path(checkpoint.checkpoint_uri(run, 4)) / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole"):
        checkpoint.fetch_newest(run, checkpoint.list_manifests(run), tmp_path / "to")


def damaged(content: bytes, damage: str) -> bytes:
    """Return what is left of a file: nothing, half, or all with a bit of one byte turned."""
    if damage == "flip":
        middle = content.index(b'"position": ') + len(b'"position": ')
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return content[: {"empty": 0, "half": len(content) // 2}[damage]]


@pytest.mark.parametrize("damage", ["empty", "half", "flip"])
def test_a_torn_manifest_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, damage: str
) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    save(run, tmp_path, 8)
    path = Path(checkpoint.checkpoint_uri(run, 8)) / checkpoint.MANIFEST_FILE
    path.write_bytes(damaged(path.read_bytes(), damage))
    found = checkpoint.survey(run)
    assert [manifest.step for manifest in found.manifests] == [4]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{path} is damaged: ")
    rewind(run, 4)
    assert not path.parent.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": 2}'])
def test_with_only_torn_manifests_nothing_starts_from_scratch(
    tmp_path: Path, content: bytes
) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    path = Path(checkpoint.checkpoint_uri(run, 4)) / checkpoint.MANIFEST_FILE
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of .* is whole .*MANIFEST\.json is d"
    ):
        checkpoint.list_manifests(run)


@pytest.mark.parametrize("version", [1, 99])
def test_a_manifest_of_another_version_is_refused_not_skipped(tmp_path: Path, version: int) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    save(run, tmp_path, 8)
    path = Path(checkpoint.checkpoint_uri(run, 8)) / checkpoint.MANIFEST_FILE
    fields = json.loads(path.read_bytes())
    del fields["sha256"]
    fields["format"] = version
    path.write_text(json.dumps({**fields, "sha256": checkpoint._digest(fields)}))
    with pytest.raises(CheckpointError, match=rf"has format {version}, not 2; use the version"):
        checkpoint.list_manifests(run)


def test_a_manifest_of_another_step_is_damaged(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    save(run, tmp_path, 4)
    save(run, tmp_path, 8)
    shutil.copytree(checkpoint.checkpoint_uri(run, 4), checkpoint.checkpoint_uri(run, 12))
    found = checkpoint.survey(run)
    assert [manifest.step for manifest in found.manifests] == [4, 8]
    assert found.problems[0].endswith("MANIFEST.json is damaged: it is the manifest of step 4")
    with pytest.raises(CheckpointError, match="it is the manifest of step 4"):
        checkpoint.read_manifest(run, 12)


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for step, loss in ((4, 0.9), (8, 0.2), (12, 0.5), (16, 0.4)):
        save(run, tmp_path, step, metrics={"val_loss": loss})
    save(run, tmp_path, 18)
    for step in (10, 20):  # of a save that failed, and of one that is under way
        checkpoint.store_files(tmp_path / "source-4", checkpoint.checkpoint_uri(run, step))
    best = checkpoint.best_of(checkpoint.list_manifests(run), monitor="val_loss", mode="min")
    checkpoint.prune(run, keep=2, best=best)
    assert steps(run) == [8, 16, 18]
    there = sorted(path.name for path in Path(run, "checkpoints").iterdir())
    assert there == [f"step-{step:08d}" for step in (8, 16, 18, 20)]


def test_the_best_is_finite_and_the_earlier_of_equals() -> None:
    manifests = [
        make_manifest(1, metrics={"acc": math.nan}),
        make_manifest(2, metrics={"acc": 0.5}),
        make_manifest(3, metrics={"acc": 0.5}),
        make_manifest(4, metrics={"acc": math.inf}),
        make_manifest(5),
    ]
    for mode in ("min", "max"):
        best = checkpoint.best_of(manifests, monitor="acc", mode=mode)
        assert best is not None
        assert best.step == 2
    assert checkpoint.best_of(manifests, monitor="loss", mode="min") is None


def test_rewinding_clears_what_a_kill_left(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for step in (4, 8):
        save(run, tmp_path, step)
    checkpoint.store_files(tmp_path / "source-4", checkpoint.checkpoint_uri(run, 6))
    for step in (4, 8, 10):
        folder = Path(run) / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "rank-00000.parquet").touch()
    (Path(run) / "checkpoints" / "lost+found").mkdir()
    for name in ("metrics.parquet", "quarantine.parquet", "config.yaml", "result.json"):
        (Path(run) / f".{name}.x1.tmp").touch()
    (Path(checkpoint.checkpoint_uri(run, 4)) / ".MANIFEST.json.x1.tmp").touch()
    (Path(run) / ".mine.tmp").touch()
    rewind(run, 4)
    (Path(run) / "checkpoints" / "lost+found").rmdir()  # not ours, so left alone
    assert steps(run) == [4]
    assert [p.name for p in Path(run).rglob(".*")] == [".mine.tmp"]
    assert [p.name for p in (Path(run) / "samples").iterdir()] == ["step-00000004"]
    assert [p.name for p in (Path(run) / "checkpoints").iterdir()] == ["step-00000004"]


def test_what_other_drivers_and_commands_may_be_writing_goes_once_it_is_old(tmp_path: Path) -> None:
    names = [".lease-000002.json.x1.tmp", ".report.html.x1.tmp"]
    for name in names:
        (tmp_path / name).touch()
    clear_unfinished(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        os.utime(tmp_path / name, (0, time.time() - 120))
    clear_unfinished(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
