"""Worker side: one worker's split of the stream -> batches on its device.

The order of the blocks is checked where they are taken apart, in assemble.py.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pyarrow as pa
import torch

from orchestrator.data.assemble import Costs, WrongOrderError, assemble
from orchestrator.data.batch import MicroBatch
from orchestrator.data.device import Ahead, ToDevice
from orchestrator.data.plan import Batching

_CLOSE_TIMEOUT_S = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Current:
    """What the training step that runs now works on."""

    batch: MicroBatch
    weight: float
    """What its mean loss is multiplied with; 0 for a stand-in."""
    loss_samples: int
    """Samples that count: 0 for a stand-in."""
    starts_step: bool
    """Whether it is this worker's first micro-batch of an optimizer step."""
    ends_step: bool
    """Whether it is the last."""


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """This worker's blocks of one segment."""

    blocks: Generator[pa.Table, None, None]
    stop_step: int
    """The step before which they end."""
    open_next_at: int
    """The step before which the next segment should be opened."""


OpenSegment = Callable[[int], Opened]
"""The first step -> what starts there; all workers call it together."""


class Loader:
    """One worker's batches, step after step, over as many Ray Data executions as it takes.

    Args:
        batching: how positions are cut into steps and micro-batches.
        rank: this worker.
        step: the first step.
        open_segment: starts the next Ray Data execution; all workers call it together, some steps
            before the one in hand ends, so that nobody waits between two.
        to_device: turns a micro-batch into what training_step gets.
        image_size: side S of the images.
        shares_cpus: whether reading takes CPU time from this worker.
    """

    def __init__(
        self,
        batching: Batching,
        *,
        rank: int,
        step: int,
        open_segment: OpenSegment,
        to_device: ToDevice,
        image_size: int,
        shares_cpus: bool = False,
    ) -> None:
        self.batching = batching
        self.shares_cpus = shares_cpus
        self.current: Current | None = None
        self.waited_s = 0.0
        """Seconds spent waiting for blocks so far."""
        self.waiting_since: float | None = None
        """When the wait for a block began that goes on (`time.monotonic`), if one does."""
        self.prepared_s = 0.0
        """Seconds spent on turning micro-batches into batches on the device so far."""
        self.image_size = image_size
        self.costs = Costs()
        self._rank = rank
        self._step = step
        self._open_segment = open_segment
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="next-segment")
        self._reading: list[tuple[Generator[pa.Table, None, None], Future[pa.Table | None]]] = []
        self._first: Opened | None = None
        self._batches = self._all_batches()
        self._drawn = self._due()
        self._held = collections.deque[tuple[Current, MicroBatch]]()
        self._ahead = Ahead(self._supply(), to_device)
        # Stands in, with weight 0, where a worker's share of a short step is empty: its latest
        # batch, so that running statistics see real images.
        self._stand_in = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
        self._stand_in_labels: list[Any] = [None, None]

    def start(self) -> None:
        """Begin to read, rather than when the first batch is asked for; all workers call it."""
        self._first = self._open(self._step)

    def take(self, steps: int) -> "Pass":
        """Return the next `steps` steps as a sized iterable for Lightning's loops."""
        return Pass(self, steps * self.batching.accumulation)

    def _all_batches(self) -> Generator[MicroBatch, None, None]:
        step, opened = self._step, self._first
        while step < self.batching.num_steps:
            opened = opened or self._open(step)
            following = None
            due = step * self.batching.micro_batches + self._rank
            for batch in assemble(
                opened.blocks, self.batching, rank=self._rank, micro=due, costs=self.costs
            ):
                due = batch.micro + self.batching.num_workers
                if following is None and self._is_time(batch.micro, opened):
                    following = self._open(opened.stop_step)
                yield batch
            if due != opened.stop_step * self.batching.micro_batches + self._rank:
                raise WrongOrderError(
                    f"worker {self._rank} ran out of blocks before micro-batch {due}; the steps "
                    f"up to {opened.stop_step} were due."
                )
            step, opened = opened.stop_step, following

    def _open(self, step: int) -> Opened:
        opened = self._open_segment(step)
        # Ray Data starts an execution when all workers have asked for their first block.
        first = self._starter.submit(next, opened.blocks, None)
        self._reading = [*self._reading[-1:], (opened.blocks, first)]
        return dataclasses.replace(opened, blocks=_chained(first, opened.blocks))

    def _is_time(self, micro: int, opened: Opened) -> bool:
        last = opened.stop_step >= self.batching.num_steps
        return not last and micro // self.batching.micro_batches >= opened.open_next_at

    def _due(self) -> Iterator[tuple[Current, MicroBatch]]:
        """Yield what each training step works on, a stand-in where its share is empty."""
        last = self.batching.num_steps * self.batching.micro_batches - self.batching.num_workers
        while True:
            began, self.waiting_since = time.perf_counter(), time.monotonic()
            batch = next(self._batches, None)
            self.waiting_since = None
            self.waited_s += time.perf_counter() - began
            if batch is None:
                return
            if batch.micro >= last:
                # Let Ray Data see the end of its blocks, and clean up while Ray lives.
                next(self._batches, None)
            good = len(batch.ids)
            accumulation = self.batching.accumulation
            turn = batch.micro // self.batching.num_workers % accumulation
            current = Current(
                batch=batch,
                weight=self.batching.loss_weight(batch.micro, good),
                loss_samples=good,
                starts_step=turn == 0,
                ends_step=turn == accumulation - 1,
            )
            if good:
                self._stand_in, self._stand_in_labels = batch.pixels, batch.labels
                yield current, batch
            else:
                yield current, self._stand_in_for(batch)

    def _supply(self) -> Iterator[tuple[Current, MicroBatch]]:
        while True:
            item = self._held.popleft() if self._held else next(self._drawn, None)
            if item is None:
                return
            yield item

    def hold(self, steps: int) -> None:
        """Wait for the micro-batches of the next steps, so that none of these waits for its own.

        All workers call it after the same step: drawing may open the next segment.
        """
        for _ in range(steps * self.batching.accumulation):
            item = next(self._drawn, None)
            if item is not None:
                self._held.append(item)

    def _stand_in_for(self, batch: MicroBatch) -> MicroBatch:
        count = len(self._stand_in_labels)
        return dataclasses.replace(
            batch,
            pixels=self._stand_in,
            labels=self._stand_in_labels,
            ids=[""] * count,
            epochs=[0] * count,
        )

    def next_batch(self) -> dict[str, Any]:
        """Return the next batch on the device, and set `current` to what it holds."""
        began, waited_s = time.perf_counter(), self.waited_s
        found = next(self._ahead, None)
        if found is None:
            raise WrongOrderError(
                f"worker {self._rank} ran out of blocks before the run's last step."
            )
        self.prepared_s += time.perf_counter() - began - (self.waited_s - waited_s)
        self.current, batch = found
        return batch

    def close(self) -> None:
        """Stop reading. Ray Data's iterator tells its coordinator, so Ray must still be up."""
        self._batches.close()
        for blocks, first in self._reading:
            # Where another worker has died, the first block never comes: Ray ends this one too.
            wait([first], timeout=_CLOSE_TIMEOUT_S)
            if first.done():
                blocks.close()
        self._starter.shutdown(wait=False)


def _chained(
    first: "Future[pa.Table | None]", rest: Iterator[pa.Table]
) -> Generator[pa.Table, None, None]:
    block = first.result()
    if block is not None:
        yield block
        yield from rest


class Pass:
    """A fixed number of batches of a `Loader`; nothing is read before the first is asked for."""

    def __init__(self, loader: Loader, num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self._num_batches):
            yield self._loader.next_batch()
