"""Temporary folders of saves: a kill leaks none."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from orchestrator.train.saving.staging import Staging


def test_what_a_killed_process_left_is_deleted_and_what_lives_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if (pid := os.fork()) == 0:
        (Staging().folder() / "half.pt").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.glob("*/*/half.pt"))) == 1
    alive = Staging()
    folder = alive.folder()
    assert list(tmp_path.glob("*/*/half.pt")) == []
    other = Staging()
    assert folder.is_dir()
    other.close()
    alive.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_killed_before_it_had_its_lock_is_deleted_once_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fresh, old = (tmp_path / f".orchestrator-save-{name}" for name in ("fresh", "old"))
    for folder in (fresh, old):
        folder.mkdir()
    os.utime(old, (0, time.time() - 120))
    Staging().close()
    assert list(tmp_path.iterdir()) == [fresh]
