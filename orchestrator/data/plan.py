"""Steps -> micro-batches -> read tasks: who consumes which positions of the stream. Pure.

A step's samples are cut into `num_workers * accumulation` micro-batches of consecutive positions
whose sizes differ by at most one; micro-batch k belongs to worker k mod num_workers. So samples are
consumed in stream order whatever the number of workers, and a reader holds one window at a time.

A read task covers whole windows, so that no chunk is read twice. It yields *rounds*: one block for
each worker, with the worker's next micro-batches. Ray Data deals blocks to workers in strict round
robin, so every block of a round reaches its worker. Where a task ends inside a round, the round is
cut there, and a micro-batch may travel in two *pieces*.
"""

import dataclasses
from collections.abc import Iterator

from orchestrator.data.stream import Order, Window

# Pixels of one block. A block costs Ray Data some 20 ms of CPU whatever its size (two cores, 90
# empty blocks a second), decoding these pixels about 500 ms; more would only delay the first batch.
BLOCK_BYTES = 32 << 20
# Of small images no more than this many micro-batches, so that a worker starts soon.
_MAX_BLOCK_BATCHES = 16
# Rows a read task aims at: several micro-batches, so that a task's fixed cost (about 10 ms) does
# not show, and few enough that its pixels (150 MB at 224 x 224) fit the object store many times.
TASK_ROWS = 1024


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
    block_batches: int = 1
    """Micro-batches of one worker that travel in one block."""

    @classmethod
    def for_training(
        cls,
        *,
        total: int,
        global_batch: int,
        num_workers: int,
        max_micro_batch: int,
        sample_bytes: int = BLOCK_BYTES,
    ) -> "Batching":
        """Derive the accumulation from the user's global batch."""
        accumulation = -(-global_batch // (num_workers * max_micro_batch))
        micro_batch = -(-global_batch // (num_workers * accumulation))
        together = _block_batches(micro_batch * sample_bytes)
        return cls(total, global_batch, num_workers, accumulation, together)

    @classmethod
    def for_evaluation(
        cls,
        *,
        samples: int,
        passes: int,
        num_workers: int,
        max_batch: int,
        sample_bytes: int = BLOCK_BYTES,
    ) -> "Batching":
        """Make one "step" of each pass over the split, every worker with equally many batches.

        No batch is empty as long as there are at least as many samples as workers.
        """
        batches = -(-samples // (num_workers * max_batch))
        accumulation = max(1, min(batches, samples // num_workers))
        micro_batch = -(-samples // (num_workers * accumulation))
        together = _block_batches(micro_batch * sample_bytes)
        return cls(samples * passes, samples, num_workers, accumulation, together)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step, all workers together."""
        return self.num_workers * self.accumulation

    @property
    def micro_batch(self) -> int:
        """Most samples of one micro-batch."""
        return -(-self.step_samples // self.micro_batches)

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


def _block_batches(micro_batch_bytes: int) -> int:
    return min(_MAX_BLOCK_BATCHES, max(1, round(BLOCK_BYTES / micro_batch_bytes)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive positions of one micro-batch."""

    micro: int
    start: int
    stop: int
    complete: bool
    """Whether the micro-batch ends here."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What one Ray Data read task yields: the positions [start, stop) as rounds of blocks."""

    start: int
    stop: int
    micro: int
    """The first micro-batch it yields a piece of."""
    stop_micro: int
    """One more than the last."""
    windows: tuple[Window, ...]
    """The windows that hold [start, stop), in order; the first and last may reach beyond."""


def tasks(order: Order, batching: Batching, *, step: int, stop_step: int) -> Iterator[Task]:
    """Yield the read tasks of steps [step, stop_step): whole windows, but for both ends."""
    position, _ = batching.step_bounds(step)
    end = batching.step_bounds(stop_step - 1)[1]
    micro, last = step * batching.micro_batches, stop_step * batching.micro_batches
    while position < end:
        windows = tuple(_windows(order, position, end))
        stop = min(windows[-1].stop, end)
        following = micro
        while following < last and batching.bounds(following)[1] <= stop:
            following += 1
        split = following < last and batching.bounds(following)[0] < stop
        yield Task(position, stop, micro, following + split, windows)
        position, micro = stop, following


def _windows(order: Order, start: int, end: int) -> Iterator[Window]:
    """Yield a task's windows: at least one, and as many more as bring it near `TASK_ROWS`."""
    window = order.window_at(start)
    yield window
    while window.stop < end and window.stop - start < TASK_ROWS:
        window = order.window_at(window.stop)
        if window.stop - start > 2 * TASK_ROWS:
            return
        yield window


def rounds(task: Task, batching: Batching) -> Iterator[list[list[Piece]]]:
    """Yield a task's rounds: for each worker, in rank order, the pieces that its block holds."""
    together = batching.num_workers * batching.block_batches
    for number in range(task.micro // together, -(-task.stop_micro // together)):
        blocks: list[list[Piece]] = [[] for _ in range(batching.num_workers)]
        first = max(task.micro, number * together)
        for micro in range(first, min(task.stop_micro, (number + 1) * together)):
            start, stop = batching.bounds(micro)
            piece = Piece(micro, max(start, task.start), min(stop, task.stop), stop <= task.stop)
            blocks[batching.worker(micro)].append(piece)
        yield blocks
