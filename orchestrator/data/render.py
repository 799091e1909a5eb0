"""What one read task does: decode the samples of its windows and yield them as blocks.

Runs inside Ray Data's read tasks but needs no Ray: bytes in, Arrow tables out. One table is one
block with one row: a worker's part of a round, its pixels as one contiguous uint8 buffer
(n, S, S, 3) that the worker maps without a copy.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator import storage
from orchestrator.config import DataConfig
from orchestrator.data import fetch, plan
from orchestrator.data.fetch import Cost, Layout, Sample, Work
from orchestrator.data.images.crop import Crop, center_crop, random_crop
from orchestrator.data.images.decode import BadImage, decode
from orchestrator.data.stream import hash_key

_LABEL_TYPES = {
    "class": pa.int64(),
    "multi": pa.list_(pa.int32()),
    "float": pa.float64(),
    "none": pa.null(),
}
_PIECE = pa.struct(
    [("micro", pa.int64()), ("start", pa.int64()), ("stop", pa.int64()), ("complete", pa.bool_())]
)
_BAD = pa.struct(
    [(name, pa.string()) for name in ("id", "uri", "reason", "first_bytes")]
    + [("position", pa.int64()), ("epoch", pa.int64())]
)
_COST = pa.struct(
    [(name, pa.float64()) for name in ("read_s", "decode_s", "slow_s", "waited_s")]
    + [(name, pa.int64()) for name in ("requests", "retries", "bytes")]
    + [("slow_uri", pa.string())]
)
# Of a bad image, shown where it is listed: enough to see what it is instead.
_FIRST_BYTES = 16


def block_schema(label_kind: str) -> pa.Schema:
    """Return the columns of a block."""
    return pa.schema(
        [
            ("worker", pa.int32()),
            ("pieces", pa.list_(_PIECE)),
            ("pixels", pa.large_binary()),
            ("positions", pa.list_(pa.int64())),
            ("epochs", pa.list_(pa.int64())),
            ("labels", pa.list_(_LABEL_TYPES[label_kind])),
            ("ids", pa.list_(pa.string())),
            # Images that could not be decoded: they are in none of the four columns above.
            ("bad", pa.list_(_BAD)),
            # Of the whole round, in the block of its first worker.
            ("cost", _COST),
        ]
    )


@dataclasses.dataclass(frozen=True)
class Render:
    """How encoded images become pixels."""

    data: DataConfig
    seed: int
    augment: bool
    """Random crops and flips; False: the centre crop of evaluation."""

    def crop(self, width: int, height: int, *, epoch: int, sample_id: str) -> Crop:
        """Return the part of an image that is shown; random ones are keyed by (seed, epoch, id)."""
        if not self.augment:
            return center_crop(width, height, self.data.eval_crop)
        return random_crop(
            width,
            height,
            scale=self.data.crop_scale,
            ratio=self.data.crop_ratio,
            flip=self.data.flip,
            key=hash_key("augment", self.seed, epoch, sample_id),
        )

    def decode(self, sample: Sample, out: npt.NDArray[np.uint8]) -> None:
        """Write the part of a sample that is shown into `out`, uint8 (S, S, 3).

        Raises:
            BadImage: it cannot be decoded, or is not what was packed.
        """
        if sample.lost:
            reason, _, detail = sample.lost.partition(": ")
            raise BadImage(reason, detail)
        decode(
            sample.image,
            out,
            functools.partial(self.crop, epoch=sample.epoch, sample_id=sample.id),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """All that a reading process needs to know of a run, but for the work itself."""

    batching: plan.Batching
    render: Render
    layout: Layout

    def blocks(self, work: Work) -> Iterator[pa.Table]:
        """Yield the work's rounds, a block for each worker in rank order, as one-row tables."""
        cost, before = Cost(), storage.traffic()
        samples = fetch.samples(work, self.layout, lambda: cost)
        schema = block_schema(self.layout.label_kind)
        for round_pieces in plan.rounds(work.task, self.batching):
            blocks = [_Block(worker, mine, self.render) for worker, mine in enumerate(round_pieces)]
            self._fill(blocks, samples, cost)
            before = cost.note_traffic(before)
            for block in blocks:
                yield block.table(schema, cost if block.worker == 0 else Cost())
            cost = Cost()

    def _fill(self, blocks: list["_Block"], samples: Iterator[Sample], cost: Cost) -> None:
        pieces = [(piece, block) for block in blocks for piece in block.pieces]
        for piece, block in sorted(pieces, key=lambda pair: pair[0].micro):
            for sample in itertools.islice(samples, piece.stop - piece.start):
                began = time.perf_counter()
                block.add(sample)
                cost.decode_s += time.perf_counter() - began


class _Block:
    """A worker's part of a round while it is filled."""

    def __init__(self, worker: int, pieces: list[plan.Piece], render: Render) -> None:
        self.worker = worker
        self.pieces = pieces
        self._render = render
        self._good: list[Sample] = []
        self._bad: list[dict[str, Any]] = []
        side = render.data.image_size
        room = sum(piece.stop - piece.start for piece in pieces)
        self._pixels = np.empty((room, side, side, 3), dtype=np.uint8)

    def add(self, sample: Sample) -> None:
        """Decode a sample; one that is bad is noted and leaves no gap."""
        try:
            self._render.decode(sample, self._pixels[len(self._good)])
        except BadImage as error:
            self._bad.append(
                {
                    "id": sample.id,
                    "uri": sample.uri,
                    "reason": str(error),
                    "first_bytes": bytes(sample.image[:_FIRST_BYTES]).hex(),
                    "position": sample.position,
                    "epoch": sample.epoch,
                }
            )
        else:
            self._good.append(sample)

    def table(self, schema: pa.Schema, cost: Cost) -> pa.Table:
        """Return the block; its pixels are not copied."""
        pixels = self._pixels[: len(self._good)]
        offsets = pa.py_buffer(np.array([0, pixels.nbytes], dtype=np.int64))
        column = pa.Array.from_buffers(
            pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels.reshape(-1))]
        )
        row = {
            "worker": [self.worker],
            "pieces": [[dataclasses.asdict(piece) for piece in self.pieces]],
            "pixels": column,
            "positions": [[sample.position for sample in self._good]],
            "epochs": [[sample.epoch for sample in self._good]],
            "labels": [[sample.label for sample in self._good]],
            "ids": [[sample.id for sample in self._good]],
            "bad": [self._bad],
            "cost": [dataclasses.asdict(cost)],
        }
        return pa.table(row, schema=schema)
