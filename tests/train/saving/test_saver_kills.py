"""Saves that are killed at any moment: nothing committed is lost, nothing is consumed twice."""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import saves
from s3 import S3Server

pytestmark = pytest.mark.slow
SCRIPT = Path(saves.__file__).with_name("killed_saves.py")


def run_script(*args: str) -> tuple[list[int], int]:
    """Return the steps that a script of kills printed, and how often it killed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    *steps, last = done.stdout.splitlines()
    return [int(step) for step in steps], int(last.removeprefix("kills "))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """In memory where that can be: a kill of a process does not ask for what fsync promises."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield str(tmp_path)
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield made


def test_killed_before_any_file_operation_a_run_goes_on(folder: str) -> None:
    steps, kills = run_script("every", folder)
    assert kills == len(steps) > 50
    counts = Counter(steps)
    assert counts[2] > 10
    assert counts[4] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_of_two_workers_is_killed_a_run_goes_on(folder: str, rank: int) -> None:
    steps, kills = run_script("one", folder, str(rank))
    assert kills == len(steps) > 15
    assert {0, 2} <= set(steps) <= {0, 2, 4}


def test_killed_before_any_request_to_a_bucket_a_run_goes_on(s3: S3Server) -> None:
    steps, kills = run_script("every", f"{s3.make_bucket('killed')}/every")
    assert kills == len(steps) > 20
    assert set(steps) == {0, 2, 4}


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_killed_at_random_moments_a_run_goes_on(request: pytest.FixtureRequest, place: str) -> None:
    if place == "folder":
        runs = request.getfixturevalue("folder")
    else:
        runs = request.getfixturevalue("s3").make_bucket("killed") + "/random"
    steps, kills = run_script("random", runs, "12", "5")
    assert len(steps) == 12
    assert kills > 0


def test_a_whole_checkpoint_is_there_at_every_instant_of_200_saves_and_15_kills(
    folder: str,
) -> None:
    steps, kills = run_script("poll", f"{folder}/run", "15", "3")
    assert kills == 15
    assert steps[-1] == 200
    assert len(set(steps)) > 50
