"""Worker side: one worker's split of the stream -> batches on its device.

Every block says which positions it holds. They are checked here, at the consumer: blocks in a wrong
order raise and are never trained on.
"""

import bisect
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator.data.batch import MicroBatch
from orchestrator.data.plan import Batching

# Blocks fetched ahead of the training step by Ray Data's own thread: one is enough to be decoded
# and moved while the one before it, which holds several micro-batches, is trained on.
PREFETCH_BLOCKS = 1


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
    blocks: Iterator[pa.Table], batching: Batching, *, rank: int, micro: int, costs: "Costs"
) -> Iterator[MicroBatch]:
    """Yield worker `rank`'s micro-batches from number `micro` on, pieces joined, order checked.

    What the blocks say that reading them cost is added to `costs`.

    Raises:
        WrongOrderError: a block holds other positions than are due.
    """
    due, _ = batching.bounds(micro)
    held: list[_Part] = []
    for block in blocks:
        row = {name: block[name][0] for name in block.column_names}
        costs.add(row["cost"].as_py())
        for part in _parts(row):
            found = (part.micro, part.start, row["worker"].as_py())
            if found != (micro, due, rank):
                raise WrongOrderError(
                    f"worker {rank} was dealt (micro-batch, position, worker) {found} where "
                    f"{(micro, due, rank)} was due; the run stops because its order is wrong."
                )
            held.append(part)
            due = part.stop
            if part.complete:
                yield _join(micro, held)
                held = []
                micro += batching.num_workers
                due, _ = batching.bounds(micro)
    if held:
        raise WrongOrderError(f"worker {rank} got no end to its micro-batch {micro}.")


@dataclasses.dataclass
class Costs:
    """What reading took so far, in seconds, as the blocks of this worker say."""

    read_s: float = 0.0
    """Decoding waited for chunks, all read tasks together."""
    decode_s: float = 0.0
    slow_s: float = 0.0
    """The slowest read of one chunk since it was last asked for."""
    slow_uri: str = ""

    def add(self, cost: dict[str, Any]) -> None:
        """Add what one round cost."""
        self.read_s += cost["read_s"]
        self.decode_s += cost["decode_s"]
        if cost["slow_s"] > self.slow_s:
            self.slow_s, self.slow_uri = cost["slow_s"], cost["slow_uri"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """A piece of a micro-batch with its samples."""

    micro: int
    start: int
    stop: int
    complete: bool
    pixels: torch.Tensor
    columns: dict[str, list[Any]]
    bad: list[dict[str, Any]]


_PER_SAMPLE = ("positions", "epochs", "labels", "ids")


def _parts(row: dict[str, Any]) -> Iterator[_Part]:
    columns = {name: row[name].as_py() for name in _PER_SAMPLE}
    bad = row["bad"].as_py()
    pixels = _pixels(row["pixels"], len(columns["ids"]))
    first = 0
    for piece in row["pieces"].as_py():
        last = bisect.bisect_left(columns["positions"], piece["stop"], lo=first)
        yield _Part(
            **piece,
            pixels=pixels[first:last],
            columns={name: values[first:last] for name, values in columns.items()},
            bad=[entry for entry in bad if piece["start"] <= entry["position"] < piece["stop"]],
        )
        first = last


def _pixels(column: pa.LargeBinaryScalar, count: int) -> torch.Tensor:
    flat = np.frombuffer(column.as_buffer(), dtype=np.uint8)
    side = round((flat.size / (3 * count)) ** 0.5) if count else 0
    return torch.from_numpy(flat.reshape(count, side, side, 3))


def _join(micro: int, parts: list[_Part]) -> MicroBatch:
    columns = {name: [v for part in parts for v in part.columns[name]] for name in _PER_SAMPLE}
    filled = [part.pixels for part in parts if len(part.pixels)] or [parts[0].pixels]
    pixels = filled[0] if len(filled) == 1 else torch.cat(filled)
    return MicroBatch(
        micro=micro, pixels=pixels, bad=[b for part in parts for b in part.bad], **columns
    )


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
        self.costs = Costs()
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
            for batch in assemble(
                blocks, self.batching, rank=self._rank, micro=micro, costs=self.costs
            ):
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
