"""What a drained node is to a run, when workers hear of it, and what its end is charged to."""

import threading
from functools import partial
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from orchestrator.train.recovery.notice import (
    Looks,
    Notice,
    Paused,
    Watch,
    charge_of,
    drained,
    preempted_event,
    slow_save,
)
from orchestrator.train.timing.pace import Schedule

LOST_PEER = RuntimeError("Connection closed by peer")


def taken_away(*, preempted: bool) -> WorkerHealthCheckFailedError:
    """Return what Ray Train reports of a worker whose node went."""
    died = RayActorError(preempted=preempted)
    return WorkerHealthCheckFailedError("the worker died", died)


@pytest.mark.parametrize(
    ("errors", "charge"),
    [
        ([Paused("preempted at step 3")], "pause"),
        ([LOST_PEER, Paused("room at step 3")], "pause"),
        ([LOST_PEER, taken_away(preempted=True)], "preemption"),
        ([ActorDiedError(), taken_away(preempted=True)], "preemption"),
        ([taken_away(preempted=False), LOST_PEER], "failure"),
        ([ValueError("of the user's")], "failure"),
        ([], "failure"),
    ],
)
def test_what_ends_workers_is_charged(errors: list[BaseException], charge: str) -> None:
    assert charge_of(errors) == charge


def test_what_ray_cannot_do_on_a_draining_node_is_no_failure() -> None:
    unschedulable = ActorUnschedulableError("the node of worker 0 takes no new actors")
    assert charge_of([unschedulable]) == "failure"
    assert charge_of([LOST_PEER, unschedulable], draining=True) == "preemption"
    assert charge_of([taken_away(preempted=False)], draining=True) == "preemption"
    assert charge_of([ValueError("of the user's")], draining=True) == "failure"


def test_only_nodes_with_workers_matter_and_the_first_deadline() -> None:
    nodes = ["a", "b", "b", "c"]
    assert drained(nodes, {"x": 5_000}) is None
    both = drained(nodes, {"b": 9_000, "c": 4_000, "x": 1})
    assert both == Notice(reason="preempted", ranks=(1, 2, 3), deadline_s=4.0)
    assert drained(nodes, {"b": 0}) == Notice(reason="preempted", ranks=(1, 2))
    event = preempted_event((1, 2), 4.0, step=7)
    assert (event["deadline"], event["ranks"]) == ("1970-01-01T00:00:04+00:00", [1, 2])
    never = preempted_event((1,), None, step=None)
    assert (event["committed"], never["committed"], never["deadline"]) == (True, False, None)


def _same(notice: Notice | None) -> Notice | None:
    return notice


def run_looks(step_s: list[float], notice_at: int) -> tuple[list[int], list[int | None]]:
    """Step through `step_s` on two workers; return steps with a collective and when each heard."""
    now = 0.0
    seen = Notice(reason="room", workers=3)
    sides = [Looks(step=10, clock=lambda: now), Looks(step=10, clock=lambda: 17 * now)]
    collectives: list[int] = []
    heard: list[int | None] = [None, None]
    for step, seconds in enumerate(step_s, start=11):
        now += seconds
        words: list[Any] = []

        def agree(
            word: Any, words: list[Any] = words, step: int = step
        ) -> Any:  # the first to call is worker 0
            words.append(word)
            collectives.append(step)
            return words[0]

        for side, looks in enumerate(sides):
            mine = seen if side == 0 and step >= notice_at else None
            if looks.hear(step, partial(_same, mine), agree) is not None and heard[side] is None:
                heard[side] = step
        assert len(words) in (0, 2), "one worker waits for the other for ever"
    return sorted(set(collectives)), heard


def test_workers_look_twice_a_second_at_the_same_steps() -> None:
    looked, heard = run_looks([0.01] * 1000, notice_at=611)
    assert 16 <= len(looked) <= 30  # 10 s
    assert heard[0] == heard[1]
    assert heard[0] is not None
    assert 611 <= heard[0] <= 611 + 60


def test_a_look_out_of_turn_hears_at_once() -> None:
    notice = Notice(reason="preempted", ranks=(0,))
    looks = Looks(step=0, clock=lambda: 0.0)
    assert looks.hear(1, lambda: None, lambda word: (word[0], 50)) is None
    assert looks.hear(2, lambda: notice, lambda word: word) is None  # not before step 51
    assert looks.hear(2, lambda: notice, lambda word: word, now=True) == notice


def test_slow_steps_are_looked_at_each() -> None:
    looked, heard = run_looks([0.01] * 100 + [3.0] * 60, notice_at=165)
    assert heard == [165, 165]
    assert looked[-10:] == list(range(161, 171))


def test_a_save_that_does_not_fit_a_notice_makes_saves_more_frequent() -> None:
    assert slow_save(20.0) is None  # half as much again is 30 s
    notice = slow_save(21.0)
    assert notice is not None
    assert (notice.reason, notice.every_s) == ("slow_save", 84.0)
    schedule, untimed = Schedule(600.0, step=0), Schedule(None, step=0)
    asked: list[int] = []

    def agree(wait: int) -> int:
        asked.append(wait)
        return 0

    assert not untimed.due(50, agree)
    for each in (schedule, untimed):
        each.shorten(notice.every_s, step=50)
        assert not each.due(50, agree)
        assert each.due(51, agree)
    assert len(asked) == 2


def test_a_watch_survives_a_look_that_fails_and_forgets_what_has_passed() -> None:
    notice = Notice(reason="preempted", ranks=(0,))
    answers: list[Notice | Exception | None] = [ConnectionError("no GCS"), notice, None]
    looked = threading.Semaphore(0)
    go = threading.Semaphore(0)

    def look() -> Notice | None:
        looked.release()
        go.acquire()
        answer = answers.pop(0) if answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = Watch(look, poll_s=0.001)
    found = []
    for _ in range(4):
        assert looked.acquire(timeout=10)  # the answer before is in place by now
        found.append(watch.notice)
        go.release()
    assert found == [None, None, notice, None]
    watch.close()
    go.release(100)
