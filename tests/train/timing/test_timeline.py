"""Seconds by part: a worker's own clock, and what the times of a run's events say."""

import random
from typing import Any

import pytest
from moments import NOON, event
from saves import make_manifest

from orchestrator.config import Config
from orchestrator.train.account import account, redone_steps
from orchestrator.train.timing.timeline import (
    PARTS,
    Timeline,
    allocated_s,
    from_stats,
    restarted_at,
    sessions,
    step_seconds,
    time_before,
    to_stats,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_second_belongs_to_one_part() -> None:
    clock, random_ = Clock(), random.Random(0)
    timeline = Timeline(clock)
    expected = dict.fromkeys(PARTS, 0.0)
    part = "other"
    for _ in range(1_000):
        seconds = random_.random()
        clock.now += seconds
        expected[part] += seconds
        if random_.random() < 0.5:
            following = random_.choice(PARTS)
            assert timeline.enter(following) == part
            part = following
    assert timeline.seconds == pytest.approx(expected)
    assert sum(timeline.seconds.values()) == pytest.approx(clock.now - 100)


def test_what_another_clock_knows_is_moved_and_not_counted_twice() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    clock.now += 10
    timeline.move(4, source="other", to="wait")
    assert (timeline.seconds["other"], timeline.seconds["wait"]) == (6, 4)
    assert step_seconds(timeline.seconds) == 10
    timeline.restart()
    assert sum(timeline.seconds.values()) == 0


def test_seconds_survive_a_manifest() -> None:
    seconds = {part: float(n) for n, part in enumerate(PARTS)}
    assert from_stats({**to_stats(seconds), "bad": 3.0}) == seconds
    assert from_stats({"train_s": 3.0}) == dict.fromkeys(PARTS, 0.0)  # of an older run


def test_the_time_between_two_submissions_is_not_allocated() -> None:
    events = [
        event("submitted", 0),
        event("training", 20),
        event("failed", 50),
        event("submitted", 1_000),
        event("training", 1_010),
    ]
    spans = sessions(events, saved_at=NOON + 40, now=NOON + 1_011)
    assert spans == [(NOON, NOON + 50), (NOON + 1_000, NOON + 1_011)]
    assert allocated_s(spans, NOON + 40, NOON + 1_011) == 21
    assert sessions([], saved_at=0, now=NOON) == []


def test_a_session_that_was_killed_lived_until_its_last_sign_of_life() -> None:
    events = [event("submitted", 0), event("training", 20), event("submitted", 500)]
    spans = sessions(events, saved_at=NOON + 100, now=NOON + 510)
    assert spans == [(NOON, NOON + 100), (NOON + 500, NOON + 510)]
    finished = [*events, event("finished", 600)]
    assert sessions(finished, saved_at=NOON + 550, now=NOON + 9_999)[-1] == (NOON + 500, NOON + 600)


@pytest.mark.parametrize(
    ("events", "saved_at", "now", "expected"),
    [
        # The first start: all that was allocated is start-up.
        ([event("submitted", 0)], 0, 17, (17, 0)),
        # A worker was killed 30 s after the checkpoint: these, and the new start, are lost.
        ([event("submitted", 0), event("training", 17), event("failure", 90)], 60, 105, (0, 45)),
        # Killed before the first checkpoint: everything since the first start began to train.
        ([event("submitted", 0), event("training", 17)], 0, 57, (17, 40)),
        # It failed before it trained, and was submitted again: both starts are start-up.
        ([event("submitted", 0), event("failed", 9), event("submitted", 100)], 0, 108, (17, 0)),
        # The driver was killed, and the run submitted again an hour later.
        (
            [event("submitted", 0), event("training", 17), event("submitted", 3_600)],
            60,
            3_612,
            (0, 12),
        ),
    ],
)
def test_what_lies_behind_a_start(
    events: list[dict[str, Any]], saved_at: float, now: float, expected: tuple[float, float]
) -> None:
    found = time_before(events, saved_at=NOON + saved_at if saved_at else 0.0, now=NOON + now)
    assert found == pytest.approx(expected)


def test_a_start_falls_due_where_the_one_before_ended() -> None:
    def due(*events: dict[str, Any], saved_at: float = 0) -> float | None:
        begun = [event("submitted", 0), event("training", 20), event("submitted", 1_000)]
        found = restarted_at([*begun, *events], saved_at=NOON + saved_at if saved_at else 0.0)
        return found and found - NOON

    first, again = event("training", 1_020), event("training", 1_120)
    assert due(first) is None
    assert due(first, saved_at=900) is None  # of the session before
    assert due(event("failure", 1_010), first) == 1_010  # while the workers started
    for kind in ("failure", "preempted", "out_of_memory"):
        assert due(first, event(kind, 1_100), again, saved_at=1_060) == 1_100
    # There was room for more: the last checkpoint is all that is left of the start before.
    assert due(first, again, event("resized", 1_121), saved_at=1_105) == 1_105


def test_the_account_of_a_run_adds_up() -> None:
    parts = {
        "wait": 20.0, "forward_backward": 50.0, "communication": 5.0, "optimizer": 5.0,
        "checkpoint": 2.0, "validation": 3.0, "restart": 15.0, "startup": 10.0, "other": 5.0,
    }  # fmt: skip
    last = make_manifest(100, stats={**to_stats(parts), "saved_at": NOON + 115})
    events = [event("submitted", 0, cpus=8.0), event("training", 10), event("training", 60)]
    found = account(events, last, Config(), now=NOON + 121)
    assert found["time"] == {**parts, "other": 11.0}  # the end of the run is in it
    assert found["allocated_s"] == 121
    assert found["unattributed_s"] == 0
    assert found["ettr"] == pytest.approx(60 / 121)
    assert found["verdict"].startswith("input-bound: ")


def test_the_end_of_training_counts_where_it_is_of_the_last_step() -> None:
    last = make_manifest(100, stats={**to_stats(dict.fromkeys(PARTS, 1.0)), "saved_at": NOON + 9})
    later = {**to_stats(dict.fromkeys(PARTS, 2.0)), "saved_at": NOON + 18}
    events = [event("submitted", 0), event("trained", 18, step=100, stats=later)]
    assert account(events, last, Config(), now=NOON + 18)["time"]["wait"] == 2
    events[1]["step"] = 90  # of an earlier start, whose end was not the run's
    assert account(events, last, Config(), now=NOON + 18)["time"]["wait"] == 1


def test_steps_that_were_done_again_are_counted() -> None:
    events = [
        event("training", 0, step=0),
        event("failure", 9, step=17),
        event("training", 20, step=10),
        event("failure", 25, step=None),  # it had shown no step yet
        event("training", 30, step=10),
        event("failure", 40, step=12),
        event("failure", 45, step=None),
        event("training", 50, step=10),
    ]
    assert redone_steps(events) == 7 + 2


def test_a_run_that_was_never_timed_has_no_verdict() -> None:
    found = account([], make_manifest(1), Config(), now=NOON)
    assert (found["verdict"], found["ettr"], found["allocated_s"]) == (None, None, 0)
