"""What a worker does at a notice, without Ray: its steps and saves are played to it."""

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config import CheckpointConfig, Config, ScalingConfig, TrainConfig
from orchestrator.train.loop.elastic_pause import PauseAtNotice, _ahead, _Look
from orchestrator.train.recovery.notice import Looks, Notice, Paused
from orchestrator.train.timing.pace import Schedule


class Committer:
    """Saves that end as they are told to."""

    def __init__(self) -> None:
        self.totals = {"save_s": 0.0, "saves_failed": 0}
        self.works = True
        self.saves: list[int] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.committed = -1

    def save(self, step: int) -> None:
        self.saves.append(step)
        self.committed = step if self.works else self.committed

    def finish(self) -> int:
        return self.committed

    def tell(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def close(self, timeout_s: float) -> bool:
        return True


class Run:
    """One worker at its steps; its watch sees what the test puts there."""

    def __init__(self, *, every_steps: int | None = None) -> None:
        self.committer, self.lines = Committer(), deque[str]()
        train = TrainConfig(checkpoint=CheckpointConfig(every_steps=every_steps))
        board = SimpleNamespace(say=SimpleNamespace(remote=self.lines.append))
        self.recorder = SimpleNamespace(
            step=0,
            committer=self.committer,
            schedule=Schedule(600.0, step=0),
            facts=SimpleNamespace(board=board, config=Config(name="run", train=train)),
            timetable=SimpleNamespace(is_due=lambda step: False),
            cut_short=False,
            commit=lambda *_, **__: self.committer.save(self.recorder.step),
        )
        loader = SimpleNamespace(
            current=SimpleNamespace(ends_step=True), batching=SimpleNamespace(num_steps=1000)
        )
        strategy = SimpleNamespace(broadcast=lambda value: value, barrier=lambda: None)
        self.trainer = SimpleNamespace(strategy=strategy, global_rank=0, should_stop=False)
        self.pause = PauseAtNotice(
            self.recorder,  # type: ignore[arg-type]
            loader,  # type: ignore[arg-type]
            ScalingConfig(num_workers=(1, 3)),
            resize_every_s=60.0,
        )
        # What `on_train_start` does on worker 0 of a cluster.
        self.pause._looks = Looks(step=0, every_s=0.0)
        self.pause._saved = (0.0, 0.0)
        self.watch: Any = SimpleNamespace(notice=None, look=lambda: None, close=lambda: None)
        self.look: Any = SimpleNamespace(put_off=self._put_off)
        self.pause._watch, self.pause._look = self.watch, self.look
        self.put_off = 0

    def _put_off(self) -> None:
        self.put_off += 1

    def step(self) -> None:
        self.recorder.step += 1
        self.pause.on_train_batch_end(self.trainer, None)  # type: ignore[arg-type]


ROOM = Notice(reason="room", workers=3)
DRAINED = Notice(reason="preempted", ranks=(1,), deadline_s=4e9)


def test_room_for_more_workers_is_taken_after_a_commit() -> None:
    run = Run()
    run.watch.notice = ROOM
    with pytest.raises(Paused, match="room at step 1"):
        run.step()
    assert run.committer.saves == [1]
    assert run.lines[-1] == "room for 3 workers: starting them from step 1"


def test_where_it_cannot_be_committed_training_goes_on_and_tries_later() -> None:
    run = Run()
    run.watch.notice, run.committer.works = ROOM, False
    for _ in range(5):
        run.step()
    assert run.committer.saves == [1]
    assert run.put_off == 1


def test_a_run_that_ends_here_is_not_paused() -> None:
    run = Run()
    run.watch.notice, run.trainer.should_stop = DRAINED, True
    run.step()
    assert run.committer.saves == []


def test_a_node_that_goes_is_answered_by_a_commit_even_where_saving_fails() -> None:
    run = Run()
    run.watch.notice, run.committer.works = DRAINED, False
    with pytest.raises(Paused, match="preempted at step 1"):
        run.step()
    assert run.committer.saves == [1, 1]
    assert run.lines[-1].endswith("the nodes of workers [1] go; no checkpoint could be saved")


def validate(run: Run, num_batches: int) -> int:
    """Validate as Lightning's loop does; return how many batches that took."""
    trainer: Any = run.trainer
    done = 0
    run.pause.on_validation_start(trainer, None)  # type: ignore[arg-type]
    for index in range(num_batches):
        done += 1
        try:
            run.pause.on_validation_batch_end(trainer, None, None, None, index)  # type: ignore[arg-type]
        except StopIteration:
            break
    run.pause.on_validation_end(trainer, None)  # type: ignore[arg-type]
    return done


def test_a_validation_is_ended_by_a_node_that_goes_and_by_nothing_else() -> None:
    run = Run()
    run.recorder.step = 7
    run.watch.notice = ROOM
    assert validate(run, 5) == 5
    assert not run.recorder.cut_short
    run.watch.notice, run.recorder.step = DRAINED, 1000
    assert validate(run, 5) == 5  # the last of the run
    run.recorder.step = 7
    with pytest.raises(Paused, match="preempted at step 7"):
        validate(run, 5)
    assert run.recorder.cut_short
    assert run.committer.saves == [7]
    assert run.committer.events[0][1]["step"] == 7


@pytest.mark.parametrize(
    ("every_steps", "words"), [(None, "lowered to"), (10**9, "lowered to"), (1, "stays at 1 steps")]
)
def test_a_save_too_long_for_a_notice_is_told_once_with_the_interval_that_holds(
    every_steps: int | None, words: str
) -> None:
    run = Run(every_steps=every_steps)
    run.committer.totals = {"save_s": 25.0, "saves_failed": 1}
    run.step()  # that one failed
    assert not run.lines
    for save_s in (50.0, 75.0):
        run.committer.totals = {"save_s": save_s, "saves_failed": 1}
        run.step()
    (line,) = run.lines
    assert line.startswith("a checkpoint takes 25 s to be saved")
    assert words in line
    ((kind, fields),) = run.committer.events
    assert (kind, fields["save_s"]) == ("slow_save", 25.0)
    assert run.recorder.schedule.every_s == 100.0
    assert fields["is_lowered"] == words.startswith("lowered")


def test_a_missed_deadline_is_said() -> None:
    assert _ahead(12.3) == ", 12 s ahead of the deadline"
    assert _ahead(-3.2) == ", 3 s after the deadline"


def test_looking_for_room_is_put_off_by_the_time_between_two_looks() -> None:
    look = _Look(["a", "b"], ScalingConfig(num_workers=(1, 3)), every_s=0.05)
    time.sleep(0.1)
    assert look._is_time
    look.put_off()
    assert not look._is_time
