"""Saves that are killed at any moment: nothing committed is lost, nothing is consumed twice."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import saves

from orchestrator import storage
from orchestrator.train.saving import checkpoint

SCRIPT = Path(saves.__file__).with_name("killed_saves.py")


def run_script(*args: str) -> tuple[Counter[str], int]:
    """Return how many runs went on from which step, and how many were killed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    *steps, last = done.stdout.splitlines()
    return Counter(steps), int(last.removeprefix("kills "))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: a kill of a process does not ask for what fsync promises."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


@pytest.mark.slow
def test_killed_before_any_file_operation_a_run_goes_on(folder: Path) -> None:
    steps, kills = run_script(str(folder), "every")
    assert kills == sum(steps.values()) > 50
    assert steps["2"] > 10
    assert steps["4"] > 0


@pytest.mark.slow
def test_killed_at_random_moments_a_run_goes_on(folder: Path) -> None:
    steps, kills = run_script(str(folder), "random", "12", "5")
    assert sum(steps.values()) == 12
    assert kills > 0


def check_newest(run: str) -> int:
    """Return the step of the newest checkpoint, with all its files compared, or -1: none."""
    for _ in range(3):  # it may be pruned while it is read, but only once there are newer ones
        manifests = checkpoint.list_manifests(run)
        if not manifests:
            return -1
        uri = checkpoint.checkpoint_uri(run, manifests[-1].step)
        records = manifests[-1].files
        sizes = [storage.size(storage.join(uri, record.name)) for record in records]
        if sizes == [record.size for record in records]:
            return manifests[-1].step
    return -1


def test_a_whole_checkpoint_is_there_at_every_instant_of_200_saves(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    pid = os.fork()
    if pid == 0:
        worker = saves.Worker(run, keep=2)
        for step in range(1, 201):
            worker.consume(step)
            worker.save(step, must=True, last=step == 200)
        worker.committer.close(60)
        os._exit(0)
    seen = []
    try:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            seen.append(check_newest(run))
            time.sleep(0.002)
    finally:
        if not seen or check_newest(run) != 200:
            os.kill(pid, signal.SIGKILL)
    whole = seen[seen.count(-1) :]
    assert seen[: seen.count(-1)] == [-1] * seen.count(-1)  # none only before the first
    assert whole == sorted(whole)
    assert len(set(whole)) > 20
    assert [m.step for m in checkpoint.list_manifests(run)] == [199, 200]
