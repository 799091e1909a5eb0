"""Driver side: read every sample of a packed data set and decode all of it, as tasks on a cluster.

What is bad is written to `quarantine.parquet` beside what packing left out.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from orchestrator import cluster, storage
from orchestrator.config import UserError
from orchestrator.data.chunk import ChunkColumns, LostChunk, read_chunk
from orchestrator.data.formats.base import FIRST_BYTES, Bad
from orchestrator.data.images.bad import BadImage
from orchestrator.data.images.check import check_image
from orchestrator.data.index import Index, read_chunks, read_index
from orchestrator.data.packing.tally import BadTable, by_reason, read_quarantine, write_quarantine
from orchestrator.data.places import ChunkRef
from orchestrator.progress import format_duration

# Chunks of one task: some 1,000 images, seconds of work against 5 ms for starting it.
_TASK_CHUNKS = 16
# Tasks in flight for each CPU: one works, one waits.
_TASKS_PER_CPU = 2
_SAY_EVERY_S = 3.0


@dataclasses.dataclass(frozen=True)
class Verified:
    """What reading everything found."""

    samples: int
    """Samples that were read or should have been."""
    reasons: tuple[tuple[str, int], ...]
    """(reason, samples), the most frequent first."""

    @property
    def num_bad(self) -> int:
        """Samples that cannot be trained on."""
        return sum(count for _, count in self.reasons)


def verify(out: str, *, say: Callable[[str], None], verbose: bool = False) -> Verified:
    """Check every sample of a packed data set: label, checksum and every pixel.

    Raises:
        UserError: there is no index, or storage cannot be read at all.
    """
    out = storage.absolute(out)
    index = read_index(out)
    cluster.connect(verbose=verbose)
    total = sum(split.samples for split in index.splits.values())
    bad, progress = BadTable(), _Progress(total, say)
    for num_samples, found in _run(index):
        bad.add(found)
        progress.add(num_samples)
    table = bad.table()
    write_quarantine(out, pa.concat_tables([_of_packing(index), table]))
    return Verified(progress.done, tuple(by_reason(table)))


def _of_packing(index: Index) -> pa.Table:
    """Return what packing left out: rows of an earlier verification name rows of shards."""
    rows = read_quarantine(index.uri)
    if index.settings.get("in_place"):
        return rows.slice(0, 0)
    # The source may lie below the packed folder; `#group#row` is how rows of shards are called.
    ours = pc.and_(
        pc.starts_with(rows["uri"], f"{index.uri}/"),
        pc.match_substring_regex(rows["uri"], r"\.parquet#[0-9]+#[0-9]+$"),
    )
    return rows.filter(pc.invert(ours))


class _Progress:
    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._started = self._said = time.monotonic()
        self.done = 0

    def add(self, samples: int) -> None:
        self.done += samples
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_S:
            self._said, seconds = now, now - self._started
            left = (self._total - self.done) / self.done * seconds if self.done else 0.0
            self._say(
                f"checked {self.done:,} of {self._total:,} images, "
                f"{self.done / seconds:,.0f} images/s, ETA {format_duration(left)}"
            )


def _run(index: Index) -> Iterator[tuple[int, list[Bad]]]:
    """Yield what each task found, with a bounded number of tasks at a time."""
    check = ray.remote(num_cpus=1)(check_chunks)
    most = _TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    shared = ray.put(index)
    groups = _groups(index)
    waiting = [check.remote(refs, shared) for refs in itertools.islice(groups, most)]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        found, error = ray.get(done[0])
        if error:
            raise UserError(error)
        yield found
        waiting += [check.remote(refs, shared) for refs in itertools.islice(groups, 1)]


def _groups(index: Index) -> Iterator[list[ChunkRef]]:
    for split in index.splits:
        chunks = read_chunks(index, split)
        for start in range(0, chunks.sizes.num_chunks, _TASK_CHUNKS):
            stop = min(start + _TASK_CHUNKS, chunks.sizes.num_chunks)
            yield chunks.locate(np.arange(start, stop))


def check_chunks(refs: list[ChunkRef], index: Index) -> tuple[tuple[int, list[Bad]], str]:
    """Return how many samples the chunks have and which are bad, or what stops it all."""
    samples, bad = 0, list[Bad]()
    for ref in refs:
        samples += ref.rows
        try:
            chunk = read_chunk(ref, index.columns)
        except LostChunk as error:
            uris = [f"{ref.uri}#{ref.group}#{row}" for row in range(ref.rows)]
            bad += [Bad.of(uri, uri, error) for uri in uris]
            continue
        except UserError as error:
            return (0, []), str(error)
        bad += _bad_rows(chunk, ref.rows, index)
    return (samples, bad), ""


def _bad_rows(chunk: ChunkColumns, rows: int, index: Index) -> Iterator[Bad]:
    changed = chunk.changed_rows()
    for row in range(rows):
        values = {name: column[row].as_py() for name, column in chunk.columns.items()}
        uri = f"{chunk.uri}#{row}"
        image = chunk.images[row]
        try:
            if row in changed:
                raise BadImage("checksum", "the bytes differ from those that were packed")
            _check(image, values.get("label"), index)
        except BadImage as error:
            yield Bad.of(uri, str(values.get("id", uri)), error, bytes(image[:FIRST_BYTES]))


def _check(image: memoryview, label: object, index: Index) -> None:
    labels = label if isinstance(label, list) else [label]
    if index.label_kind in ("class", "multi") and not all(_is_class(v, index) for v in labels):
        raise BadImage("bad_label", f"{label!a} is none of the {len(index.classes)} classes")
    check_image(image)


def _is_class(value: object, index: Index) -> bool:
    if isinstance(value, int):
        return 0 <= value < len(index.classes)
    return value in index.classes
