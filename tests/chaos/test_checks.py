"""The checks of the chaos find what is planted: one that cannot fail says nothing."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from saves import make_manifest

from chaos import checks
from chaos.arena import MARK, Arena
from chaos.battle import Kill
from orchestrator.train.saving import checkpoint

SLEEP = "import sys, time; print(flush=True); time.sleep(60)"


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """Return a run that ended and left nothing."""
    with contextlib.closing(Arena(tmp_path, "data", pause_s=0.0)) as arena:
        run = Path(arena.run)
        weights = Path(checkpoint.checkpoint_uri(arena.run, 2)) / "weights.safetensors"
        samples = run / "samples/step-00000002"
        for folder in (weights.parent, samples, run / "tensorboard"):
            folder.mkdir(parents=True)
        (samples / "rank-00000.parquet").touch()
        (weights.parent / "rank-00001.json").touch()
        for name in ("config.yaml", "events.jsonl", "metrics.parquet", "result.json"):
            (run / name).touch()
        weights.touch()
        record = checkpoint.FileRecord(weights.name, 0, "")
        checkpoint.commit(arena.run, make_manifest(2, files=(record,)))
        yield arena


@contextlib.contextmanager
def python(code: str, *, mark: str = "") -> Iterator[int]:
    """Run code in a process until the block ends; it prints a line first."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {MARK: mark}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def leaks(arena: Arena, shm: set[str]) -> list[str]:
    return checks.leaks(arena, shm, patience_s=0.0)


def test_a_run_that_left_nothing_leaks_nothing(arena: Arena) -> None:
    assert leaks(arena, checks.shared_memory()) == []


def test_a_process_that_lives_on_is_found(arena: Arena) -> None:
    with python(SLEEP, mark=arena.mark) as pid:
        found = leaks(arena, checks.shared_memory())
    assert [line.split()[:2] for line in found] == [["process", str(pid)]]


def test_shared_memory_is_found_but_for_what_another_program_holds(arena: Arena) -> None:
    shm, name = checks.shared_memory(), f"planted-{os.getpid()}"
    path = Path("/dev/shm", name)
    hold = f"file = open({str(path)!r}); {SLEEP}"
    try:
        path.touch()
        assert leaks(arena, shm) == [f"shared memory {name}"]
        with python(hold):
            assert leaks(arena, shm) == []
        with python(hold, mark=arena.mark):
            assert leaks(arena, shm)[1:] == [f"shared memory {name}"]
    finally:
        path.unlink()


@pytest.mark.parametrize("name", [".orchestrator-save-x", "orchestrator-save-x", "anything"])
def test_a_temporary_folder_is_found(arena: Arena, name: str) -> None:
    (arena.temporary / name).mkdir()
    assert leaks(arena, checks.shared_memory()) == [f"temporary file or folder {name}"]


@pytest.mark.parametrize(
    "name",
    [
        "lease-000003.json",
        ".lease-000003.json.abc.tmp",
        ".config.yaml.abc.tmp",
        "ray/start-1/snapshot.json",
        "samples/step-00000002/.rank-00000.parquet.abc.tmp",
        "checkpoints/step-00000002/.MANIFEST.json.abc.tmp",
        "checkpoints/step-00000002/more.pt",
        "checkpoints/step-00000004/weights.safetensors",
    ],
)
def test_what_does_not_belong_into_the_run_is_found(arena: Arena, name: str) -> None:
    path = Path(arena.run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert leaks(arena, checks.shared_memory()) == [f"file {name} in the run's folder"]


def kills(*megabytes: float, driver: int = 1) -> list[Kill]:
    base = {"target": "worker", "pid": 2, "moment": "random", "step": 3, "at": time.time()}
    return [Kill(**base, known=frozenset(), driver=driver, driver_mb=mb) for mb in megabytes]


def test_a_driver_that_grows_is_found_beyond_its_warm_up() -> None:
    warm = kills(400, 550)
    assert checks.lives(warm + kills(600, 602, 601, 603, 601)) == []
    flat = warm + kills(600, 602, 601, 630, 603, 601, 602)
    assert checks.grown_drivers(flat) == []
    assert str(checks.lives(flat)[0]) == "601 MB of its own, 602 MB after 9 kills (+0.2%)"
    grown = [*warm, *kills(*range(600, 680, 10))]
    assert checks.grown_drivers(grown) == [
        "the driver's memory grew: 610 MB of its own, 660 MB after 10 kills (+8.2%)"
    ]


def test_each_driver_is_judged_on_its_own() -> None:
    small, large = kills(*[400.0] * 8), kills(*[600.0] * 8, driver=2)
    assert [life.growth for life in checks.lives(small + large)] == [0.0, 0.0]
