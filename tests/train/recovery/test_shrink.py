"""Out of memory: which errors say so, and what a run remembers of them."""

import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import Config, DataConfig
from orchestrator.overrides import config_digest
from orchestrator.run import read_events
from orchestrator.storage import StorageError
from orchestrator.train import memory_limits
from orchestrator.train.errors import OutOfMemory, is_out_of_memory
from orchestrator.train.memory_limits import EVAL_BATCH, MICRO_BATCH
from orchestrator.train.recovery.shrink import RememberMemory


def raised_by(allocate: object) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()  # type: ignore[operator]
    return caught.value


def test_what_allocators_raise_is_known() -> None:
    assert is_out_of_memory(raised_by(lambda: torch.empty(1 << 50)))
    assert is_out_of_memory(raised_by(lambda: np.empty(1 << 50)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(OutOfMemory("data.max_micro_batch", 8, 3, "said"))


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(raised_by(lambda: torch.empty(-1)))
    assert not is_out_of_memory(ValueError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("DataLoader worker is out of memory of its past"))


def test_the_error_travels_whole() -> None:
    error = pickle.loads(pickle.dumps(OutOfMemory("data.eval_batch", 13, 7, "no room")))
    assert (error.setting, error.size, error.step, error.smaller) == ("data.eval_batch", 13, 7, 6)
    assert (
        str(error) == "out of memory at step 7 with 13 samples at once (data.eval_batch): no room"
    )


EVENTS = [
    {"event": "training", "step": 0},
    {"event": "out_of_memory", "setting": "data.max_micro_batch", "from": 7, "to": 3},
    {"event": "out_of_memory", "setting": "data.max_micro_batch", "from": 3, "to": 1},
    {"event": "out_of_memory", "setting": "data.eval_batch", "from": 40, "to": 20},
]


def test_a_run_keeps_the_smallest_and_stays_the_same_run() -> None:
    config = Config(data=DataConfig(global_batch=13, max_micro_batch=8, eval_batch=64))
    limits = memory_limits.limits_of(EVENTS, config)
    lowered = memory_limits.limited(config, limits)
    assert (lowered.data.max_micro_batch, lowered.data.eval_batch) == (1, 20)
    assert lowered.data.global_batch == 13
    assert config_digest(lowered) == config_digest(config)
    assert memory_limits.limited(config, {}) == config
    # What the user has since lowered further stays lower.
    small = Config(data=DataConfig(max_micro_batch=2, eval_batch=8))
    assert memory_limits.limited(small, limits).data.eval_batch == 8


def test_a_limit_holds_while_the_same_is_asked_for() -> None:
    events = [{**EVENTS[1], "asked": 8}, {**EVENTS[3], "asked": 64}]
    asked = Config(data=DataConfig(max_micro_batch=8, eval_batch=64))
    assert memory_limits.limits_of(events, asked) == {
        MICRO_BATCH: 3,
        EVAL_BATCH: 20,
    }
    for other in (6, 16):
        changed = Config(data=DataConfig(max_micro_batch=other, eval_batch=64))
        assert memory_limits.limits_of(events, changed) == {EVAL_BATCH: 20}
    assert memory_limits.describe({MICRO_BATCH: 3}).startswith("data.max_micro_batch is held at 3:")
    assert memory_limits.describe({}) == ""


class Board:
    """Stands for the handle of the board's actor."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @property
    def say(self) -> Any:
        return types.SimpleNamespace(remote=self.said.append)


def remember(callback: RememberMemory, size: int) -> None:
    callback.after_exception(None, {1: OutOfMemory(MICRO_BATCH, size, 2, "no room")})


def test_what_did_not_fit_is_written_once_with_what_was_asked_for(tmp_path: Path) -> None:
    board, config = Board(), Config(data=DataConfig(max_micro_batch=8))
    callback = RememberMemory(str(tmp_path), board, config)
    for size in (7, 7, 3):
        remember(callback, size)
    events = read_events(str(tmp_path))
    assert [(e["from"], e["to"], e["asked"]) for e in events] == [(7, 3, 8), (3, 1, 8)]
    assert len(board.said) == 2


def test_storage_that_does_not_take_it_ends_the_run_at_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(memory_limits, "append_event", refuse)
    board = Board()
    callback = RememberMemory(str(tmp_path), board, Config())
    remember(callback, 7)
    assert len(board.said) == 1
    remember(callback, 5)
    with pytest.raises(StorageError):
        remember(callback, 5)


def test_a_result_says_what_was_asked_for_and_what_was_used() -> None:
    config = Config(data=DataConfig(global_batch=13, max_micro_batch=8, eval_batch=64))
    said = memory_limits.report(config, EVENTS[:2], num_workers=2)
    assert said == {"asked": 7, "used": 3, "eval_asked": 64, "eval_used": 64}
    # 13 samples of two workers never make micro-batches of 8: that is nothing to report.
    assert memory_limits.report(config, [], num_workers=2)["used"] == 7
