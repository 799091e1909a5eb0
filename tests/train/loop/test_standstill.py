"""A step that does not end is a standstill, but for what it waits for."""

import queue
import time
import types
from pathlib import Path
from typing import Any

import pytest

from orchestrator.train.loop import standstill
from orchestrator.train.loop.standstill import Standstill
from orchestrator.train.recovery.failures import StandstillError

LIMIT_S = 0.3


class Stuck:
    """A worker whose step began and does not end; what it waits for can be set."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loader: Any = types.SimpleNamespace(waiting_since=None, waited_s=0.0)
        committer = types.SimpleNamespace(totals={"save_pause_s": 0.0})
        self.recorder: Any = types.SimpleNamespace(step=4, is_saving=False, committer=committer)
        self.raised: queue.Queue[Any] = queue.Queue()
        runner = types.SimpleNamespace(get_exception_queue=lambda: self.raised)
        context = types.SimpleNamespace(
            execution_context=types.SimpleNamespace(training_thread_runner=runner)
        )
        monkeypatch.setattr(standstill, "get_train_context", lambda: context)
        monkeypatch.setattr(Standstill, "_all_are_stuck", lambda self: True)
        self.watch = Standstill(str(folder), None, LIMIT_S, self.recorder, self.loader)
        trainer: Any = types.SimpleNamespace(global_rank=0, world_size=1)
        self.watch.on_train_start(trainer, None)  # type: ignore[arg-type]
        for _ in range(2):  # the first may take longer
            self.watch.on_train_batch_start()
            self.watch.on_train_batch_end()
        self.watch.on_train_batch_start()


@pytest.mark.parametrize("waits_for", ["data", "a save"])
def test_a_wait_inside_a_step_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    stuck = Stuck(tmp_path, monkeypatch)
    if waits_for == "data":
        stuck.loader.waiting_since = time.monotonic()
    else:
        stuck.recorder.is_saving = True
    time.sleep(4 * LIMIT_S)
    assert stuck.raised.empty()
    # The step itself has as long as ever, from then on.
    stuck.loader.waiting_since, stuck.recorder.is_saving = None, False
    over = time.monotonic()
    error = stuck.raised.get(timeout=30)._base_exc
    assert time.monotonic() - over > LIMIT_S / 2
    assert isinstance(error, StandstillError)
    assert "all workers have been inside step 5 for" in str(error)
    assert "test_standstill.py" in (tmp_path / "stacks" / "rank-00000.txt").read_text()
    stuck.watch.on_exception()


def test_what_a_step_waited_for_gives_later_ones_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(tmp_path, monkeypatch)
    stuck.loader.waiting_since = time.monotonic()
    time.sleep(5 * LIMIT_S)
    stuck.loader.waiting_since = None
    stuck.loader.waited_s += 3 * LIMIT_S
    stuck.recorder.committer.totals["save_pause_s"] += 2 * LIMIT_S
    stuck.watch.on_train_batch_end()
    stuck.watch.on_train_batch_start()
    # Ten times the longest step: 15 s if the wait were part of it.
    assert stuck.raised.get(timeout=10) is not None
    stuck.watch.on_exception()
