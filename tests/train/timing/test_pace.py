"""Clocks: what counts as training, what as waiting, and when a commit by time is due."""

import pytest

from orchestrator.train.timing import pace
from orchestrator.train.timing.pace import Pace, Schedule


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def test_validation_and_commits_are_no_training_time(clock: Clock) -> None:
    waited = [0.0]
    measured = Pace(lambda: waited[0], {"train_s": 5.0, "wait_s": 1.0}, step=10)
    clock.now += 4
    waited[0] += 1
    assert measured.steps_per_s(18) == pytest.approx(2.0)
    assert measured.wait_share == pytest.approx(0.25)
    measured.stop()
    clock.now += 100  # a validation
    measured.start()
    assert measured.wait_share == pytest.approx(0.25)  # not 0 right after a commit
    clock.now += 2
    measured.stop()
    assert measured.totals == {"train_s": pytest.approx(11.0), "wait_s": pytest.approx(2.0)}


def test_a_commit_by_time_is_agreed_at_known_steps(clock: Clock) -> None:
    asked = []

    def agree(value: int) -> int:
        asked.append(value)
        return value

    schedule = Schedule(60.0, step=0)
    due = []
    for step in range(1, 200):
        clock.now += 1.0
        if schedule.due(step, agree):
            due.append(step)
            schedule.restart(step)
    assert due == [60, 120, 180]
    # Looked at after 5 steps and at the predicted one: not a collective at every step.
    assert asked == [55, 0] * 3 + [55]


def test_without_an_interval_no_worker_is_asked(clock: Clock) -> None:
    schedule = Schedule(None, step=0)
    clock.now += 1e6

    def never(value: int) -> int:
        raise AssertionError("a collective that is not needed")

    assert not any(schedule.due(step, never) for step in range(1, 50))
