"""Worker side: blocks -> micro-batches, pieces joined, order checked.

Every block says which positions it holds. They are checked here, at the consumer: blocks in a wrong
order raise and are never trained on.
"""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator.data.batch import MicroBatch
from orchestrator.data.plan import Batching


class WrongOrderError(RuntimeError):
    """Blocks arrived in another order than planned: a bug, so the run stops."""


@dataclasses.dataclass(frozen=True)
class SlowRead:
    """A chunk and how long reading it took."""

    uri: str
    seconds: float


@dataclasses.dataclass
class Costs:
    """What reading took so far, as the blocks of this worker say: rank 0's hold the whole run's."""

    read_s: float = 0.0
    """Seconds in which decoding waited for chunks, all read tasks together."""
    decode_s: float = 0.0
    requests: int = 0
    """Sent to buckets, repeated ones included."""
    retries: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    """Pauses before requests, added up over threads."""

    def __post_init__(self) -> None:
        self._slowest = SlowRead("", 0.0)

    def add(self, cost: dict[str, Any]) -> None:
        """Add what one round cost."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + cost[field.name])
        if cost["slow_s"] > self._slowest.seconds:
            self._slowest = SlowRead(cost["slow_uri"], cost["slow_s"])

    def take_slow(self, at_least_s: float) -> SlowRead | None:
        """Return the slowest read since it was last asked for, if it took as long as this."""
        slowest, self._slowest = self._slowest, SlowRead("", 0.0)
        return slowest if slowest.seconds >= at_least_s else None


def assemble(
    blocks: Iterator[pa.Table], batching: Batching, *, rank: int, micro: int, costs: Costs
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
        there = [entry for entry in bad if piece["start"] <= entry["position"] < piece["stop"]]
        held = sorted(columns["positions"][first:last] + [entry["position"] for entry in there])
        if held != list(range(piece["start"], piece["stop"])):
            raise WrongOrderError(
                f"a block holds the positions {held} where all from {piece['start']} up to "
                f"{piece['stop']} were due; the run stops because samples are missing or doubled."
            )
        yield _Part(
            **piece,
            pixels=pixels[first:last],
            columns={name: values[first:last] for name, values in columns.items()},
            bad=there,
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
