"""Steps -> micro-batches -> read tasks: who consumes which positions of the stream. Pure.

A step's samples are cut into `num_workers * accumulation` micro-batches of consecutive positions
whose sizes differ by at most one; micro-batch k belongs to worker k mod num_workers. So samples are
consumed in stream order whatever the number of workers, and a reader holds one window at a time.

A read task covers whole windows, so that no chunk is read twice. Where a task ends inside a
micro-batch, that micro-batch travels in two *pieces*. Ray Data deals blocks to workers in strict
round robin; `num_workers - 1` empty *fillers* between two pieces bring the second to the worker
that holds the first.
"""

import dataclasses
from collections.abc import Iterator

from orchestrator.data.stream import Stream

# Rows a read task aims at: several micro-batches, so that a task's fixed cost (about 10 ms) does
# not show, and few enough that its pixels (150 MB at 224 x 224) fit the object store many times.
TASK_ROWS = 1024
# Tasks of one Ray Data execution. Each costs one `ray.put` on the coordinator; starting an
# execution costs 0.7 to 2 s, against about half an hour of reading for this many tasks.
SEGMENT_TASKS = 2000


@dataclasses.dataclass(frozen=True)
class Batching:
    """How the positions [0, total) are cut into steps, and steps into micro-batches."""

    total: int
    """Positions of the whole run: epochs * samples."""
    step_samples: int
    """Samples of every step but the last."""
    num_workers: int
    accumulation: int
    """Micro-batches of one worker in one step."""

    @classmethod
    def for_training(
        cls, *, total: int, global_batch: int, num_workers: int, max_micro_batch: int
    ) -> "Batching":
        """Derive the accumulation from the user's global batch."""
        accumulation = -(-global_batch // (num_workers * max_micro_batch))
        return cls(total, global_batch, num_workers, accumulation)

    @classmethod
    def for_evaluation(
        cls, *, samples: int, passes: int, num_workers: int, max_batch: int
    ) -> "Batching":
        """Make one "step" of each pass over the split, every worker with equally many batches.

        No batch is empty as long as there are at least as many samples as workers.
        """
        batches = -(-samples // (num_workers * max_batch))
        return cls(
            samples * passes, samples, num_workers, max(1, min(batches, samples // num_workers))
        )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step, all workers together."""
        return self.num_workers * self.accumulation

    @property
    def num_steps(self) -> int:
        """Steps of the whole run; only the last may be short."""
        return -(-self.total // self.step_samples)

    def step_bounds(self, step: int) -> tuple[int, int]:
        """Return positions [start, stop) of a step."""
        start = step * self.step_samples
        return start, min(start + self.step_samples, self.total)

    def bounds(self, micro: int) -> tuple[int, int]:
        """Return positions [start, stop) of micro-batch `micro`, counted from the run's start."""
        step, part = divmod(micro, self.micro_batches)
        start, stop = self.step_bounds(step)
        samples = stop - start
        return (
            start + samples * part // self.micro_batches,
            start + samples * (part + 1) // self.micro_batches,
        )

    def worker(self, micro: int) -> int:
        """Return the rank that consumes a micro-batch."""
        return micro % self.num_workers

    def loss_weight(self, micro: int, num_good: int) -> float:
        """Return what a micro-batch's mean loss is multiplied with.

        DDP averages over workers and Lightning over accumulation; with this weight the result is
        the sum over the step's samples divided by their number, as in one process.
        """
        start, stop = self.step_bounds(micro // self.micro_batches)
        return num_good * self.micro_batches / (stop - start)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive positions of one micro-batch, or a filler (start == stop and not complete)."""

    micro: int
    worker: int
    start: int
    stop: int
    complete: bool
    """Whether the micro-batch ends here."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What one Ray Data read task yields: the positions [start, stop) as pieces."""

    start: int
    stop: int
    micro: int
    """The first micro-batch it yields a piece of."""
    stop_micro: int
    """One more than the last."""


def tasks(stream: Stream, batching: Batching, *, step: int, stop_step: int) -> list[Task]:
    """Return the read tasks of steps [step, stop_step): whole windows, but for both ends."""
    position, _ = batching.step_bounds(step)
    end = batching.step_bounds(stop_step - 1)[1]
    micro, last = step * batching.micro_batches, stop_step * batching.micro_batches
    out = []
    while position < end:
        stop = _task_stop(stream, position, end)
        following = micro
        while following < last and batching.bounds(following)[1] <= stop:
            following += 1
        split = following < last and batching.bounds(following)[0] < stop
        out.append(Task(position, stop, micro, following + split))
        position, micro = stop, following
    return out


def _task_stop(stream: Stream, start: int, end: int) -> int:
    stop = stream.window_at(start).stop
    while stop < end and stop - start < TASK_ROWS:
        following = stream.window_at(stop).stop
        if following - start > 2 * TASK_ROWS:
            break
        stop = following
    return min(stop, end)


def pieces(task: Task, batching: Batching) -> Iterator[Piece]:
    """Yield a task's pieces and fillers, in the order in which Ray Data must deal them."""
    for micro in range(task.micro, task.stop_micro):
        start, stop = batching.bounds(micro)
        complete = stop <= task.stop
        worker = batching.worker(micro)
        yield Piece(micro, worker, max(start, task.start), min(stop, task.stop), complete)
        if not complete:
            for other in range(1, batching.num_workers):
                filler = (worker + other) % batching.num_workers
                yield Piece(micro, filler, task.stop, task.stop, complete=False)


def segment_steps(stream: Stream, batching: Batching, step: int) -> int:
    """Return the step before which the Ray Data execution that starts at `step` ends."""
    rows = SEGMENT_TASKS * max(TASK_ROWS, stream.sizes.usual_rows * stream.window_chunks)
    return min(batching.num_steps, step + max(1, rows // batching.step_samples))
