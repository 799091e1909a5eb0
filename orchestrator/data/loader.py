"""Worker side: one worker's split of the stream -> batches on its device.

Every block says which positions it holds. They are checked here, at the consumer: blocks in a wrong
order raise and are never trained on.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator.data.batch import MicroBatch
from orchestrator.data.plan import Batching

# Blocks fetched ahead of the training step by Ray Data's own thread.
PREFETCH_BLOCKS = 2


class WrongOrderError(RuntimeError):
    """Blocks arrived in another order than planned: a bug, so the run stops."""


@dataclasses.dataclass(frozen=True, eq=False)
class Current:
    """What the training step that runs now works on."""

    batch: MicroBatch
    weight: float
    """What its mean loss is multiplied with; 0 for a stand-in."""
    loss_samples: int
    """Samples that count: 0 for a stand-in."""


def assemble(
    blocks: Iterator[pa.Table], batching: Batching, *, rank: int, micro: int
) -> Iterator[MicroBatch]:
    """Yield worker `rank`'s micro-batches from number `micro` on, pieces joined, order checked.

    Raises:
        WrongOrderError: a block holds other positions than are due.
    """
    due, _ = batching.bounds(micro)
    held: list[pa.Table] = []
    for block in blocks:
        row = {name: block[name][0] for name in block.column_names}
        found = (row["micro"].as_py(), row["start"].as_py(), row["worker"].as_py())
        stop, complete = row["stop"].as_py(), row["complete"].as_py()
        if stop == found[1] and not complete and found[2] == rank:
            continue  # a filler
        if found != (micro, due, rank):
            raise WrongOrderError(
                f"worker {rank} was dealt (micro-batch, position, worker) {found} "
                f"where {(micro, due, rank)} was due; the run stops because its order is wrong."
            )
        held.append(row)
        due = stop
        if complete:
            yield _join(micro, held, batching)
            held = []
            micro += batching.num_workers
            due, _ = batching.bounds(micro)
    if held:
        raise WrongOrderError(f"worker {rank} got no end to its micro-batch {micro}.")


def _join(micro: int, rows: list[dict[str, Any]], batching: Batching) -> MicroBatch:
    return MicroBatch(
        micro=micro,
        pixels=_pixels(rows),
        positions=[p for row in rows for p in row["positions"].as_py()],
        labels=[label for row in rows for label in row["labels"].as_py()],
        ids=[i for row in rows for i in row["ids"].as_py()],
        bad=[b for row in rows for b in row["bad"].as_py()],
        bad_position=batching.bounds(micro)[0],
    )


def _pixels(rows: list[dict[str, Any]]) -> torch.Tensor:
    parts = []
    for row in rows:
        count = len(row["ids"])
        flat = np.frombuffer(row["pixels"].as_buffer(), dtype=np.uint8)
        side = round((flat.size / (3 * count)) ** 0.5) if count else 0
        parts.append(torch.from_numpy(flat.reshape(count, side, side, 3)))
    parts = [part for part in parts if len(part)] or parts[:1]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


OpenSegment = Callable[[int], tuple[Iterator[pa.Table], int]]
"""step -> (this worker's blocks from that step on, the step before which they end)."""


class Loader:
    """One worker's batches, step after step, over as many Ray Data executions as it takes.

    Args:
        batching: how positions are cut into steps and micro-batches.
        rank: this worker.
        step: the first step.
        open_segment: starts the next Ray Data execution; all workers call it together.
        to_device: turns a micro-batch into what training_step gets.
        image_size: side S of the images.
    """

    def __init__(
        self,
        batching: Batching,
        *,
        rank: int,
        step: int,
        open_segment: OpenSegment,
        to_device: Callable[[MicroBatch], dict[str, Any]],
        image_size: int,
    ) -> None:
        self.batching = batching
        self.current: Current | None = None
        self.waited_s = 0.0
        """Seconds spent waiting for blocks so far."""
        self._rank = rank
        self._step = step
        self._open_segment = open_segment
        self._to_device = to_device
        self._batches = self._all_batches()
        # Stands in, with weight 0, where a worker's share of a short step is empty: its latest
        # batch, so that running statistics see real images.
        self._stand_in = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
        self._stand_in_labels = [0, 0]

    def take(self, steps: int) -> "Pass":
        """Return the next `steps` steps as a sized iterable for Lightning's loops."""
        return Pass(self, steps * self.batching.accumulation)

    def _all_batches(self) -> Generator[MicroBatch, None, None]:
        while self._step < self.batching.num_steps:
            blocks, stop_step = self._open_segment(self._step)
            micro = self._step * self.batching.micro_batches + self._rank
            for batch in assemble(blocks, self.batching, rank=self._rank, micro=micro):
                yield batch
                micro = batch.micro + self.batching.num_workers
            if micro != stop_step * self.batching.micro_batches + self._rank:
                raise WrongOrderError(
                    f"worker {self._rank} ran out of blocks before micro-batch {micro}; the steps "
                    f"up to {stop_step} were due."
                )
            self._step = stop_step

    def next_batch(self) -> dict[str, Any]:
        """Return the next batch on the device, and set `current` to what it holds."""
        began = time.perf_counter()
        batch = next(self._batches, None)
        self.waited_s += time.perf_counter() - began
        if batch is None:
            raise WrongOrderError(
                f"worker {self._rank} ran out of blocks before the run's last step."
            )
        if batch.micro >= self.batching.num_steps * self.batching.micro_batches - (
            self.batching.num_workers
        ):
            # The last one: let Ray Data see the end of its blocks, and clean up while Ray lives.
            next(self._batches, None)
        good = len(batch.ids)
        self.current = Current(batch, self.batching.loss_weight(batch.micro, good), good)
        if good:
            self._stand_in, self._stand_in_labels = batch.pixels, batch.labels
            return self._to_device(batch)
        ids = [""] * len(self._stand_in_labels)
        return self._to_device(
            dataclasses.replace(batch, pixels=self._stand_in, labels=self._stand_in_labels, ids=ids)
        )

    def close(self) -> None:
        """Stop reading. Ray Data's iterator tells its coordinator, so Ray must still be up."""
        self._batches.close()


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
