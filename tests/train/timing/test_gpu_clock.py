"""How a GPU divides its steps: with events of a stream that exists on paper only."""

import itertools

import pytest

from orchestrator.train.timing.gpu_clock import GpuClock
from orchestrator.train.timing.timeline import Timeline


class Stream:
    """A GPU that is at so many milliseconds, and whose queue reaches further."""

    def __init__(self) -> None:
        self.queued = 0.0
        self.done = 0.0
        self.now = 0.0


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.queued

    def query(self) -> bool:
        return self.at <= self.stream.done

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "the CPU would wait"
        return end.at - self.at


def run(stream: Stream, clock: GpuClock, steps: int) -> None:
    """Queue steps of 30 ms forward and backward, twice, and 10 ms of optimizer."""
    for step in range(steps):
        stream.queued += 30  # the first micro-batch
        clock.begin(step)
        stream.queued += 30
        clock.mark()
        stream.queued += 10
        clock.mark()
        # The CPU queues in no time, and waits in the trainer's loop until it is one step ahead.
        stream.done = stream.queued - 70
        stream.now += 0.07


def test_the_gpus_time_is_divided_as_its_events_say() -> None:
    stream = Stream()
    timeline = Timeline(lambda: stream.now)
    clock = GpuClock(timeline, accumulation=2, event=lambda: Event(stream))
    run(stream, clock, 101)
    assert timeline.seconds["other"] == pytest.approx(7.07)
    clock.settle(101)
    assert timeline.seconds["forward_backward"] == pytest.approx(6.06)
    assert timeline.seconds["optimizer"] == pytest.approx(1.01)
    assert timeline.seconds["other"] == pytest.approx(0, abs=1e-9)
    clock.settle(101)
    assert sum(timeline.seconds.values()) == pytest.approx(7.07)


def test_steps_that_are_not_done_are_not_waited_for() -> None:
    stream = Stream()
    made = itertools.count()

    def event() -> Event:
        next(made)
        return Event(stream)

    timeline = Timeline(lambda: stream.now)
    clock = GpuClock(timeline, accumulation=2, event=event)
    run(stream, clock, 10)
    stream.done = 0.0
    run(stream, clock, 1)  # looks at step 0 again: nothing has been done on the GPU
    clock.settle(11)
    assert timeline.seconds["forward_backward"] == 0
    assert next(made) == 6  # three for each step that was looked at, none for the others
