"""Failures: which count, when the run gives up, and what the controller can read of them."""

import pickle

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from orchestrator.config import UserError
from orchestrator.storage import OutageError
from orchestrator.train.recovery.failures import (
    WINDOW_S,
    CodeError,
    FailureCount,
    mark_step,
    portable,
    step_of,
)
from orchestrator.train.recovery.mistakes import GaveUp, diagnose

KILLED = "worker 1's process ended"


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def count(max_failures: int = 8) -> tuple[FailureCount, Clock]:
    clock = Clock()
    return FailureCount(max_failures=max_failures, clock=clock), clock


def test_the_same_failure_three_times_at_one_step_ends_the_run() -> None:
    failures, clock = count()
    for _ in range(2):
        clock.now += 60
        assert not failures.add("ValueError: odd", cause="code", step=7).give_up
    assert not failures.add("ValueError: even", cause="code", step=7).give_up
    assert not failures.add(KILLED, cause="process", step=None).give_up
    verdict = failures.add("ValueError: odd", cause="code", step=7)
    assert verdict.give_up.startswith("same failure three times at step 7: ValueError: odd; mend")
    assert verdict.count == 5


def give_ups(cause: str, said: list[str], steps: list[int]) -> list[bool]:
    failures, _ = count(max_failures=1000)
    verdicts = zip(said, steps, strict=True)
    return [bool(failures.add(e, cause=cause, step=step).give_up) for e, step in verdicts]


def test_a_failure_that_was_got_beyond_is_another_one() -> None:
    assert not any(give_ups("code", ["odd"] * 4, [7, 7, 8, 7]))
    assert give_ups("code", ["odd"] * 5, [7, 7, 8, 7, 7]) == [False] * 5
    assert give_ups("process", [KILLED] * 4, [7, 7, 8, 7])[-1] is False


def test_workers_that_are_killed_at_one_shown_step_are_told_apart() -> None:
    # Steps that take a minute: each of these may be another step's, or nobody's.
    others = [f"worker {i % 2}'s process ended on node 10.0.0.{i}" for i in range(9)]
    assert not any(give_ups("process", others, [100] * 9))
    assert give_ups("process", [KILLED] * 3, [100] * 3) == [False, False, True]


def test_a_crash_whose_step_is_not_known_exactly_ends_the_run() -> None:
    # The step is shown twice a second: 710 is where it always dies.
    failures, _ = count()
    for step in (705, 698, 702, 700):
        assert not failures.add(KILLED, cause="process", step=step).give_up
    said = failures.add(KILLED, cause="process", step=703).give_up
    assert said.startswith(f"same failure 5 times without getting beyond step 705: {KILLED}; see")


def test_objects_at_other_addresses_are_the_same_failure() -> None:
    failures, _ = count()
    said = [f"TypeError: <Thing at 0x7f{i}a>" for i in range(3)]
    verdicts = [failures.add(text, cause="code", step=None) for text in said]
    assert [bool(verdict.give_up) for verdict in verdicts] == [False, False, True]
    assert "three times before the first step" in verdicts[-1].give_up


@pytest.mark.parametrize("cause", ["process", "hang", "controller"])
def test_processes_that_end_while_they_start_say_nothing_about_a_step(cause: str) -> None:
    failures, _ = count(max_failures=4)
    verdicts = [failures.add(KILLED, cause=cause, step=None) for _ in range(5)]
    assert [bool(verdict.give_up) for verdict in verdicts] == [False] * 4 + [True]
    assert "the 5. failure within 24 hours, more than train.max_failures=4" in verdicts[4].give_up


def test_a_reader_that_dies_under_way_is_charged_to_nobody_unless_it_always_does() -> None:
    failures, _ = count(max_failures=1)
    assert [failures.add("gone", cause="loader", step=step).count for step in range(9)] == [0] * 9
    for step in (20, 15, 17, 16):
        assert not failures.add("gone 1", cause="loader", step=step).give_up
    said = failures.add("gone 2", cause="loader", step=14).give_up
    assert "same failure 5 times without getting beyond step 20" in said


def test_storage_that_fails_may_pass() -> None:
    failures, _ = count(max_failures=3)
    verdicts = [failures.add("no answer", cause="storage", step=3) for _ in range(4)]
    assert [bool(verdict.give_up) for verdict in verdicts] == [False, False, False, True]


def test_failures_of_yesterday_are_forgotten() -> None:
    failures, clock = count(max_failures=1)
    for step in range(20):
        clock.now += WINDOW_S
        assert failures.add(KILLED, cause="process", step=step).count == 1
    clock.now += WINDOW_S - 1
    assert failures.add(KILLED, cause="process", step=99).give_up


def test_no_failure_is_survived_where_that_was_asked_for() -> None:
    failures, _ = count(max_failures=0)
    verdict = failures.add("ValueError: odd", cause="code", step=7)
    assert verdict.give_up == (
        "ValueError: odd (at step 7, and train.max_failures=0); mend the code, or the data of that "
        "step, or raise train.max_failures"
    )


class Peculiar(Exception):
    """Cannot be read back: its constructor takes what it does not keep."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}\nand more")


def test_errors_of_the_users_own_travel_as_words() -> None:
    error = Peculiar(1, 2)
    mark_step(error, 12)
    with pytest.raises(CodeError) as caught, portable():
        raise error
    read = pickle.loads(pickle.dumps(caught.value))
    assert (str(read), step_of(read)) == ("Peculiar: 1 and 2", 12)
    with pytest.raises(UserError, match="a mistake"), portable():
        raise UserError("a mistake")


LOST = CodeError("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer", 6)
DEAD = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def test_the_cause_is_told_from_what_follows_it() -> None:
    def found(**errors: BaseException) -> tuple[int, str, int | None]:
        by_rank = {int(name[-1]): error for name, error in errors.items()}
        cause = diagnose(by_rank, hang_timeout_s=120)
        return cause.rank, cause.cause, cause.step

    own = CodeError("RuntimeError: the shapes differ", 6)
    assert found(rank0=LOST, rank1=own) == (1, "code", 6)
    assert found(rank0=LOST, rank1=DEAD) == (1, "process", None)
    assert found(rank0=ActorDiedError(), rank1=DEAD) == (1, "process", None)
    assert found(rank0=LOST, rank1=ActorDiedError()) == (1, "loader", None)
    assert found(rank0=LOST) == (0, "process", None)
    late = WorkerHealthCheckTimeoutError("hangs")
    assert found(rank0=LOST, rank1=late) == (1, "hang", None)
    assert found(rank0=OutageError("no answer"), rank1=LOST) == (0, "storage", None)


def test_a_mistake_of_the_users_wins() -> None:
    with pytest.raises(UserError, match=r"model\.lr"):
        diagnose({0: DEAD, 1: UserError("model.lr=0 must be above 0.")}, hang_timeout_s=1)


def test_giving_up_travels_whole() -> None:
    read = pickle.loads(pickle.dumps(GaveUp("it is over", "Traceback ...")))
    assert (str(read), read.trace) == ("it is over", "Traceback ...")
