"""Pauses, patience and the rate, on a clock that only sleeping moves."""

import logging
import random

import pytest

from orchestrator.stores.faults import OutageError, TransientError, judge
from orchestrator.stores.retry import Patience, Rate, Traffic


class Clock:
    """Time that passes only when someone sleeps."""

    def __init__(self):
        self.now = 1000.0
        self.pauses = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def patience(clock):
    return Patience(clock=clock, sleep=clock.sleep, uniform=random.Random(0).uniform)


def failing(times, *, slow=False):
    """Return a request that fails so often and then returns "content", and its calls."""
    calls = []

    def request():
        calls.append(1)
        if len(calls) <= times:
            raise TransientError("503 SlowDown", slow=slow)
        return "content"

    return request, calls


def call(patience, request, *, patience_s=600.0):
    return patience.call(
        request, what="s3://bucket/folder", remedy="check the network", patience_s=patience_s
    )


def test_what_fails_is_repeated_and_counted(patience, clock):
    request, calls = failing(5)
    assert call(patience, request) == "content"
    patience.received(7)
    assert len(calls) == 6
    assert patience.traffic == Traffic(
        requests=6, retries=5, bytes=7, waited_s=pytest.approx(sum(clock.pauses))
    )


def test_pauses_grow_with_full_jitter_and_are_bounded(patience, clock):
    call(patience, failing(60)[0])
    bounds = [min(5.0, 0.1 * 2**n) for n in range(1, 61)]
    assert all(0 <= pause <= bound for pause, bound in zip(clock.pauses, bounds, strict=True))
    late = clock.pauses[10:]
    assert min(late) < 1 < 4 < max(late)
    assert len(set(clock.pauses)) == 60


def test_another_error_is_not_repeated(patience):
    calls = []

    def request():
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        call(patience, request)
    assert len(calls) == 1


def test_patience_ends_with_the_place_and_the_remedy(patience, clock):
    message = r"^s3://bucket/folder does not answer \(503 SlowDown; \d+ tries in \d+ s\); check the"
    started = clock.now
    with pytest.raises(OutageError, match=message):
        call(patience, failing(10**6)[0])
    assert 590 < clock.now - started <= 600


def test_an_outage_of_a_minute_is_said_once_in_ten_seconds(patience, clock, caplog):
    end = clock.now + 60

    def request():
        if clock.now < end:
            raise TransientError("no connection")
        return "content"

    with caplog.at_level(logging.WARNING):
        assert call(patience, request) == "content"
    lines = [record.getMessage() for record in caplog.records]
    assert 4 <= len(lines[:-1]) <= 6  # pauses of up to 5 s lie between the moments to speak
    for line in lines[:-1]:
        assert "s3://bucket/folder does not answer (no connection; " in line
        assert "next try in " in line
    assert "s3://bucket/folder answers again after 6" in lines[-1]
    assert clock.now < end + 5


def test_a_short_trouble_is_not_worth_a_line(patience, caplog):
    call(patience, failing(2)[0])
    assert caplog.records == []


def test_one_unlucky_request_among_others_is_not_worth_a_line(patience, clock, caplog):
    def unlucky():
        call(patience, failing(0)[0])  # what another thread does meanwhile
        clock.now += 2
        if clock.now < 1030:
            raise TransientError("no byte in time")

    call(patience, unlucky)
    assert caplog.records == []


def drive(rate, clock, seconds, answer):
    """Send as fast as the rate allows, at most 200/s; return the requests of each second."""
    sent = []
    start = clock.now
    while clock.now < start + seconds:
        clock.now += max(rate.take(), 1 / 200)
        sent.append(int(clock.now - start))
        rate.note(refused=answer())
    return [sent.count(second) for second in range(seconds)]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.4])
def test_after_a_burst_of_refusals_the_rate_halves_in_five_seconds_and_climbs(clock, share):
    draws = random.Random(1)
    rate = Rate(clock, lambda low, high: (low + high) / 2)
    before = drive(rate, clock, 5, lambda: False)[-1]
    burst = drive(rate, clock, 6, lambda: draws.random() < share)
    assert burst[-1] <= before / 2
    after = drive(rate, clock, 40, lambda: False)
    assert after[0] <= before / 2
    assert after[5] > after[0]
    assert after[-1] >= 0.9 * before


def test_a_store_with_a_capacity_is_used_without_many_refusals(clock):
    rate = Rate(clock, random.Random(0).uniform)
    window = []
    refused = []

    def answer():
        window[:] = [at for at in window if at > clock.now - 1] + [clock.now]
        refused.append(len(window) > 50)
        return refused[-1]

    sent = drive(rate, clock, 60, answer)
    settled = sent[20:]
    assert sum(settled) / len(settled) > 35
    late = refused[-sum(settled) :]
    assert sum(late) / len(late) < 0.35


def test_refusals_that_do_not_depend_on_the_rate_starve_nobody(clock):
    draws = random.Random(2)
    rate = Rate(clock, random.Random(0).uniform)
    sent = drive(rate, clock, 60, lambda: draws.random() < 0.2)
    assert sent[-1] > 60


def test_nobody_is_shut_out_for_ever(clock):
    rate = Rate(clock, lambda low, high: (low + high) / 2)
    sent = drive(rate, clock, 60, lambda: True)
    assert sent[-1] == pytest.approx(Rate.FLOOR_PER_S, abs=1)


@pytest.mark.parametrize(
    ("status", "code", "verdict"),
    [
        (None, "", "again"),
        (500, "InternalError", "again"),
        (502, "", "again"),
        (503, "SlowDown", "slow"),
        (503, "", "slow"),
        (504, "", "again"),
        (501, "NotImplemented", "wrong"),
        (429, "", "slow"),
        (400, "RequestTimeout", "again"),
        (400, "ExpiredToken", "identity"),
        (403, "InvalidAccessKeyId", "identity"),
        (403, "SignatureDoesNotMatch", "identity"),
        (403, "AccessDenied", "denied"),
        (403, "", "denied"),
        (404, "NoSuchKey", "missing"),
        (412, "PreconditionFailed", "changed"),
        (416, "InvalidRange", "changed"),
        (400, "InvalidRequest", "wrong"),
        (400, "", "identity"),  # AWS's answer to a HEAD with an expired token
        (301, "PermanentRedirect", "wrong"),
    ],
)
def test_what_an_answer_means(status, code, verdict):
    assert judge(status, code) == verdict
