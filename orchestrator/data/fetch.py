"""A read task's windows -> its encoded samples in stream order, the next chunks on their way."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data import balance, plan
from orchestrator.data.chunk import (
    ChunkColumns,
    DoubtfulError,
    LostChunk,
    forget_footers,
    read_chunk,
)
from orchestrator.data.places import ChunkRef
from orchestrator.data.stream import Ints, Window

# Chunks that one task fetches at once. They wait for storage, not for a CPU.
_THREADS = 8
_CHANGED = "checksum: the bytes differ from those that were packed"
# Windows whose chunks a task holds or fetches: the one that is decoded and the next.
WINDOWS_HELD = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A read task and where its chunks lie."""

    task: plan.Task
    chunks: tuple[tuple[ChunkRef, ...], ...]
    """For each window of the task, the chunk of each of its sections."""


class Sample(NamedTuple):
    """One encoded image at its place in the stream."""

    position: int
    epoch: int
    id: str
    label: Any
    """int, list of int, float or None, as the index's `label_kind` says."""
    image: bytes | memoryview
    uri: str
    lost: str
    """Why it cannot be shown, where that is known before it is decoded; else empty."""


@dataclasses.dataclass
class Cost:
    """What reading and decoding took, in seconds."""

    read_s: float = 0.0
    """Waited for chunks."""
    decode_s: float = 0.0
    slow_s: float = 0.0
    """The slowest read of one chunk."""
    slow_uri: str = ""
    requests: int = 0
    """Of this process to buckets, repeated ones included."""
    retries: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    """Pauses before requests, added up over threads."""

    def note_read(self, seconds: float, uri: str) -> None:
        """Keep the slowest read."""
        if seconds > self.slow_s:
            self.slow_s, self.slow_uri = seconds, uri

    def note_traffic(self, before: storage.Traffic) -> storage.Traffic:
        """Add what this process has read from buckets since; return its totals so far."""
        now = storage.traffic()
        self.requests += now.requests - before.requests
        self.retries += now.retries - before.retries
        self.bytes += now.bytes - before.bytes
        self.waited_s += now.waited_s - before.waited_s
        return now


@dataclasses.dataclass(frozen=True)
class Lost:
    """A chunk that cannot be read: its samples are bad, each with its place as its id."""

    uri: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A chunk that was read."""

    found: ChunkColumns
    ids: list[str]
    labels: list[Any] | None
    changed: frozenset[int]
    """Rows whose image is not the one that was packed."""

    @property
    def uri(self) -> str:
        """Of the chunk."""
        return self.found.uri


Chunk = Whole | Lost


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the shards of an index are read."""

    columns: Mapping[str, str]
    """What we call a column -> its name in the shards; see `chunk.read_chunk`."""
    label_kind: str
    classes: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None
    """Of a sample of each class, for weighted sampling; see `balance.picks`."""

    def read(self, ref: ChunkRef) -> tuple["Chunk", float]:
        """Read a chunk and check its labels; return it and how many seconds that took.

        Raises:
            StorageError: storage does not answer, or refuses everything.
            UserError: a label lies outside the classes, or is needed and cannot be read.
        """
        began = time.perf_counter()
        try:
            chunk = self._look(ref)
            is_doubtful = isinstance(chunk, Lost) or bool(chunk.changed)
        except DoubtfulError:
            is_doubtful = True
        if is_doubtful:
            # A byte may have flipped on the way; what lies there is decided by a second look.
            forget_footers()
            chunk = self._look(ref)
        if isinstance(chunk, Lost) and self.class_weights is not None:
            raise UserError(
                f"{ref.uri} row group {ref.group} cannot be read ({chunk.reason}), but "
                "data.class_weights needs the labels in it; restore the shard or pack again."
            )
        return chunk, time.perf_counter() - began

    def _look(self, ref: ChunkRef) -> "Chunk":
        uri = f"{ref.uri}#{ref.group}"
        try:
            found = read_chunk(ref, self.columns)
            if self.label_kind == "class":
                found.columns["label"] = self._classes_of(found)
            # As lists, at once: a value at a time costs ten times as much.
            ids, labels = (
                found.columns[name].to_pylist() if name in found.columns else None
                for name in ("id", "label")
            )
        except LostChunk as error:
            return Lost(uri, str(error))
        except UnicodeDecodeError as error:
            return Lost(uri, f"damaged: an id is not UTF-8 ({error.reason})")
        # A sample without an id of its own is named by its place.
        names = [given or f"{uri}#{row}" for row, given in enumerate(ids or [None] * ref.rows)]
        return Whole(found, names, labels, found.changed_rows())

    def _classes_of(self, chunk: ChunkColumns) -> pa.Array:
        labels = chunk.columns["label"]
        if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
            labels = pc.index_in(labels, value_set=pa.array(self.classes, labels.type))
        allowed = pc.and_(pc.greater_equal(labels, 0), pc.less(labels, len(self.classes)))
        if not pc.all(pc.fill_null(allowed, False)).as_py():
            row = pc.index(pc.fill_null(allowed, False), False).as_py()
            raise DoubtfulError(
                f"{chunk.uri} row {row} has the label {chunk.columns['label'][row].as_py()!r} but "
                f"the data set has {len(self.classes)} classes; mend the shard and pack again."
            )
        return labels


def samples(work: Work, layout: Layout, cost: Callable[[], Cost]) -> Iterator[Sample]:
    """Yield the samples at a task's positions, holding two windows' chunks at most.

    What it waited for is added to the `cost` of the moment.
    """
    coming = collections.deque[tuple[Window, list[_Coming]]]()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for window, refs in zip(work.task.windows, work.chunks, strict=True):
            coming.append((window, _start(work.task, window, refs, layout, pool)))
            if len(coming) == WINDOWS_HELD:
                yield from _window_samples(work.task, *coming.popleft(), layout, cost)
        while coming:
            yield from _window_samples(work.task, *coming.popleft(), layout, cost)
    finally:
        # An error is not kept waiting by reads that nobody wants any more.
        pool.shutdown(wait=False, cancel_futures=True)


_Coming = Future[tuple[Chunk, float]] | None


def _start(
    task: plan.Task,
    window: Window,
    refs: tuple[ChunkRef, ...],
    layout: Layout,
    pool: ThreadPoolExecutor,
) -> list[_Coming]:
    """Start reading the chunks of a window that the task needs."""
    needed = set(range(len(refs)))
    if layout.class_weights is None:  # else the labels of all samples decide
        start, stop = max(task.start, window.start), min(task.stop, window.stop)
        sections, _ = window.samples(start, stop)
        needed = set(np.unique(sections).tolist())
    return [
        pool.submit(layout.read, ref) if number in needed else None
        for number, ref in enumerate(refs)
    ]


def _window_samples(
    task: plan.Task, window: Window, coming: list[_Coming], layout: Layout, cost: Callable[[], Cost]
) -> Iterator[Sample]:
    chunks = [_wait(future, cost) for future in coming]
    position, stop = max(task.start, window.start), min(task.stop, window.stop)
    places = _order(window, chunks, layout)[position - window.start : stop - window.start]
    sections, rows = window.locate(places)
    for section, row in zip(sections.tolist(), rows.tolist(), strict=True):
        chunk = chunks[section]
        assert chunk is not None
        yield _sample(chunk, row, position=position, epoch=int(window.epoch[section]))
        position += 1


def _order(window: Window, chunks: list[Chunk | None], layout: Layout) -> Ints:
    if layout.class_weights is None:
        return window.order()
    labels = [
        chunk.found.columns["label"].slice(first, rows).to_numpy()
        for chunk, first, rows in zip(chunks, window.first_row, window.rows, strict=True)
        if isinstance(chunk, Whole)
    ]
    key = window.start if window.key is None else window.key
    return balance.picks(np.concatenate(labels), np.array(layout.class_weights), key)


def _wait(future: _Coming, cost: Callable[[], Cost]) -> Chunk | None:
    if future is None:
        return None
    began = time.perf_counter()
    chunk, seconds = future.result()
    cost().read_s += time.perf_counter() - began
    cost().note_read(seconds, chunk.uri)
    return chunk


def _sample(chunk: Chunk, row: int, *, position: int, epoch: int) -> Sample:
    uri = f"{chunk.uri}#{row}"
    if isinstance(chunk, Lost):
        return Sample(position, epoch, uri, None, b"", uri, chunk.reason)
    return Sample(
        position=position,
        epoch=epoch,
        id=chunk.ids[row],
        label=None if chunk.labels is None else chunk.labels[row],
        image=chunk.found.images[row],
        uri=uri,
        lost=_CHANGED if row in chunk.changed else "",
    )
