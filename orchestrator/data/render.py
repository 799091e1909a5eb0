"""What one read task does: read the chunks of its windows, decode, and yield micro-batches.

Runs inside Ray Data's read tasks but needs no Ray: bytes in, Arrow tables out. One table is one
block with one row: a piece of one micro-batch, its pixels as one contiguous uint8 buffer
(n, S, S, 3) that the worker maps without a copy.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from orchestrator import storage
from orchestrator.config import DataConfig, UserError
from orchestrator.data import plan
from orchestrator.data.decode import BadImage, Crop, center_crop, decode, random_crop
from orchestrator.data.index import Chunks
from orchestrator.data.stream import Stream, WindowSlice, hash_key

BLOCK_SCHEMA = pa.schema(
    [
        ("micro", pa.int64()),
        ("worker", pa.int32()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("complete", pa.bool_()),
        ("pixels", pa.large_binary()),
        ("positions", pa.list_(pa.int64())),
        ("labels", pa.list_(pa.int64())),
        ("ids", pa.list_(pa.string())),
        # Images that could not be decoded: they are in none of the columns above.
        ("bad", pa.list_(pa.struct([(n, pa.string()) for n in ("id", "uri", "reason")]))),
    ]
)
_COLUMNS = ["id", "image", "label", "checksum"]
# Footers of shards, kept by each read process: a window's chunks come from many shards.
_CACHED_FOOTERS = 256


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


@dataclasses.dataclass(frozen=True)
class Sample:
    """One encoded image at its place in the stream."""

    position: int
    epoch: int
    id: str
    label: int
    image: bytes
    checksum: int
    uri: str


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
    """All that a read task needs: where the bytes lie, in which order, and what becomes of them."""

    chunks: Chunks
    stream: Stream
    batching: plan.Batching
    render: Render

    def blocks(self, task: plan.Task) -> Iterator[pa.Table]:
        """Yield the task's pieces and fillers as one-row tables of `BLOCK_SCHEMA`."""
        samples = self.samples(task.start, task.stop)
        for piece in plan.pieces(task, self.batching):
            size = piece.stop - piece.start
            yield self._block(piece, [next(samples) for _ in range(size)])

    def samples(self, start: int, stop: int) -> Iterator[Sample]:
        """Yield the samples at positions [start, stop), holding one window's chunks at a time."""
        for part in self.stream.windows(start, stop):
            tables = {int(i): self._read(int(part.chunks[i])) for i in np.unique(part.chunk)}
            yield from self._window_samples(part, tables)

    def _window_samples(
        self, part: WindowSlice, tables: dict[int, dict[str, Any]]
    ) -> Iterator[Sample]:
        for offset, (chunk, row) in enumerate(
            zip(part.chunk.tolist(), part.row.tolist(), strict=True)
        ):
            table = tables[chunk]
            yield Sample(
                position=part.start + offset,
                epoch=part.epoch,
                id=table["id"][row].as_py(),
                label=table["label"][row].as_py(),
                image=table["image"][row].as_py(),
                checksum=table["checksum"][row].as_py(),
                uri=f"{table['uri']}#{row}",
            )

    def _read(self, chunk: int) -> dict[str, Any]:
        uri, group = self.chunks.locate(chunk)
        rows = int(self.chunks.sizes.rows(np.array([chunk]))[0])
        return {"uri": f"{uri}#{group}", **read_chunk(uri, group, rows)}

    def _block(self, piece: plan.Piece, samples: list[Sample]) -> pa.Table:
        side = self.render.data.image_size
        pixels = np.empty((len(samples), side, side, 3), dtype=np.uint8)
        good: list[Sample] = []
        bad: list[dict[str, str]] = []
        for sample in samples:
            try:
                self._decode(sample, pixels[len(good)])
                good.append(sample)
            except BadImage as error:
                bad.append({"id": sample.id, "uri": sample.uri, "reason": str(error)})
        return _table(piece, pixels[: len(good)], good, bad)

    def _decode(self, sample: Sample, out: npt.NDArray[np.uint8]) -> None:
        if xxhash.xxh3_64_intdigest(sample.image) != sample.checksum:
            raise BadImage("checksum", "the bytes differ from those that were packed")
        crop = functools.partial(self.render.crop, epoch=sample.epoch, sample_id=sample.id)
        decode(sample.image, out, crop)


def _table(
    piece: plan.Piece, pixels: npt.NDArray[np.uint8], good: list[Sample], bad: list[dict[str, str]]
) -> pa.Table:
    # The buffer is handed over without a copy; Ray copies it once, into shared memory.
    offsets = pa.py_buffer(np.array([0, pixels.nbytes], dtype=np.int64))
    column = pa.Array.from_buffers(
        pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels.reshape(-1))]
    )
    row = {
        "micro": [piece.micro],
        "worker": [piece.worker],
        "start": [piece.start],
        "stop": [piece.stop],
        "complete": [piece.complete],
        "pixels": column,
        "positions": [[sample.position for sample in good]],
        "labels": [[sample.label for sample in good]],
        "ids": [[sample.id for sample in good]],
        "bad": [bad],
    }
    return pa.table(row, schema=BLOCK_SCHEMA)


def read_chunk(uri: str, group: int, rows: int) -> dict[str, pa.Array]:
    """Read one row group: columns id, image, label, checksum as Arrow arrays of `rows` values.

    Raises:
        UserError: the shard is not the one that was indexed.
    """
    try:
        with storage.open_input(uri) as file:
            shard = pq.ParquetFile(file, metadata=_footer(uri, os.getpid()), pre_buffer=True)
            table = shard.read_row_group(group, columns=_COLUMNS, use_threads=False)
    except (pa.ArrowInvalid, pa.ArrowKeyError, IndexError) as error:
        raise UserError(
            f"{uri} row group {group} cannot be read ({_first_line(error)}), so the shard is not "
            "the one that was indexed; restore it or pack again."
        ) from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{uri} has no column {missing[0]!r}; pack the data again.")
    if table.num_rows != rows:
        raise UserError(
            f"{uri} row group {group} has {table.num_rows} rows but the index says {rows}, so the "
            "index's digest no longer matches its shards; restore the shard or pack again."
        )
    return {name: table[name].combine_chunks() for name in _COLUMNS}


@functools.lru_cache(maxsize=_CACHED_FOOTERS)
def _footer(uri: str, pid: int) -> pq.FileMetaData:
    with storage.open_input(uri) as file:
        return pq.read_metadata(file)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
