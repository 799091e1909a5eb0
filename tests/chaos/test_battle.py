"""When the chaos kills, and what it does where there is nothing to kill."""

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import battle, command, victims
from chaos.arena import Arena
from chaos.battle import Battle
from orchestrator.train.saving.checkpoint import MANIFEST_FILE


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    """Return a run that has begun a step, and whose driver lives."""
    with contextlib.closing(Arena(tmp_path, "data", pause_s=0.0)) as arena:
        (tmp_path / "driver.log").write_text("the last line")
        (tmp_path / "steps").write_text("1.0 1 1\n")
        (Path(arena.run) / "checkpoints").mkdir(parents=True)
        arena.driver = sleeper()
        yield arena


def make_battle(arena: Arena, **options: float) -> Battle:
    return Battle(arena=arena, rng=random.Random(0), say=print, **options)


@pytest.fixture
def victim(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    process = sleeper()
    monkeypatch.setattr(victims, "choose", lambda *_: process.pid)
    yield process
    process.kill()
    process.wait()


def test_a_target_that_never_lives_is_an_error(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(battle, "_STEP_TIMEOUT_S", 0.3)
    with pytest.raises(TimeoutError, match=r"(?s)no controller within 0\.3 s.*the last line"):
        make_battle(arena)._strike("controller")


def test_no_kill_begins_after_the_deadline_nor_the_end(arena: Arena) -> None:
    assert make_battle(arena, deadline=time.monotonic())._strike("controller") is None
    assert arena.driver is not None
    arena.driver.kill()
    arena.driver.wait()
    assert make_battle(arena)._strike("controller") is None


def test_a_kill_during_a_save_is_told_from_what_an_earlier_kill_left(
    arena: Arena, victim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(battle, "_SAVE_TIMEOUT_S", 2.0)
    saved = Path(arena.run) / "checkpoints"
    (saved / "step-00000002").mkdir()
    saving = threading.Timer(0.2, (saved / "step-00000004").mkdir)
    saving.start()
    kill = make_battle(arena)._try("worker", at_save=True)
    saving.join()
    assert kill is not None
    assert (kill.pid, kill.moment, kill.step) == (victim.pid, "save", 1)


@pytest.mark.parametrize("committed", [True, False])
def test_a_kill_beside_saves_is_a_random_one(
    arena: Arena,
    victim: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    committed: bool,
) -> None:
    monkeypatch.setattr(battle, "_SAVE_TIMEOUT_S", 0.1)
    folder = Path(arena.run) / "checkpoints/step-00000002"
    folder.mkdir()
    if committed:
        (folder / MANIFEST_FILE).touch()
    kill = make_battle(arena)._try("worker", at_save=True)
    assert kill is not None
    assert (kill.pid, kill.moment) == (victim.pid, "random")


def test_an_undisturbed_run_that_fails_is_wrong(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit() -> None:
        arena.driver = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    assert arena.driver is not None
    arena.driver.kill()
    arena.driver.wait()
    monkeypatch.setattr(arena, "submit", submit)
    assert command._train(arena) == ["the undisturbed run ended with 3:\nthe last line"]
