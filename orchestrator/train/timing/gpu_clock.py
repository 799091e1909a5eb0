"""Worker side: what a GPU does in a step, by events, on one step of many. Not measured on a GPU.

The CPU only queues kernels and waits for them wherever it first needs a result, so its clock says
little about a step's parts. Events lie in the same queue; they are read some steps later, when they
have long happened, so that nothing waits for them.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from orchestrator.train.timing.timeline import Part, Timeline

_EVERY_STEPS = 50


class Event(Protocol):
    """What of a `torch.cuda.Event` is used."""

    def record(self) -> None:
        """Mark this place of the current stream."""

    def query(self) -> bool:
        """Return whether the stream has come past it."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from here to `end`."""


def _cuda_event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


class GpuClock:
    """Divides the steps' time of a timeline as the GPU divides its own.

    Args:
        timeline: of this worker.
        accumulation: micro-batches of a step; the last of them is measured.
        event: makes an event.
    """

    def __init__(
        self, timeline: Timeline, *, accumulation: int, event: Callable[[], Event] = _cuda_event
    ) -> None:
        self._timeline = timeline
        self._accumulation = accumulation
        self._event = event
        self._marks: list[Event] = []
        self._milliseconds = (0.0, 0.0)
        self._samples = 0

    def begin(self, steps: int) -> None:
        """Mark the beginning of a step's last micro-batch, if this is a step to look at."""
        if steps % _EVERY_STEPS == 0:
            self._read()
            self._marks = [self._event()]
            self._marks[0].record()

    def mark(self) -> None:
        """Mark the end of the backward pass, then of the optimizer, of a step that is looked at."""
        if 0 < len(self._marks) < 3:
            self._marks.append(self._event())
            self._marks[-1].record()

    def _read(self) -> None:
        if len(self._marks) == 3 and self._marks[2].query():
            begin, between, end = self._marks
            forward_backward, optimizer = self._milliseconds
            self._milliseconds = (
                forward_backward + begin.elapsed_time(between) * self._accumulation,
                optimizer + between.elapsed_time(end),
            )
            self._samples += 1

    def settle(self, steps: int) -> None:
        """Let forward and backward, and the optimizer, have what the GPU spent on them."""
        if not self._samples:
            return
        seconds = self._timeline.seconds
        parts: tuple[Part, Part] = ("forward_backward", "optimizer")
        for part, milliseconds in zip(parts, self._milliseconds, strict=True):
            has = seconds[part] + (seconds["communication"] if part == parts[0] else 0.0)
            lacks = milliseconds / 1_000 / self._samples * steps - has
            self._timeline.move(
                min(lacks, max(0.0, self._timeline.seconds["other"])), source="other", to=part
            )
