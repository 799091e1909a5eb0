"""Worker side: what a run writes down about itself: metrics, consumed samples, bad images."""

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from orchestrator import storage
from orchestrator.config import Config
from orchestrator.data.batch import MicroBatch
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE
from orchestrator.train.saving.checkpoint import store_files

METRICS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("samples", pa.int64()),
        ("time", pa.float64()),
        ("name", pa.string()),
        ("value", pa.float64()),
    ]
)
_SAMPLES_SCHEMA = pa.schema(
    [("epoch", pa.int64()), ("step", pa.int64()), ("rank", pa.int32()), ("id", pa.string())]
)
_QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("uri", "id", "reason", "first_bytes")]
    + [("epoch", pa.int64())]
)
# Each save of new rows adds one; one of 400,000 rows is made of them in some 5 ms.
_MAX_CHUNKS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known about a run before its first step."""

    run: str
    config: Config
    index_digest: str
    strategy: str
    precision: str
    samples_per_epoch: int
    board: Any
    """Handle of the progress board actor."""
    lease: str
    """Token of this start's lease on the run."""


def _encode(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


Follower = Callable[[dict[str, float], dict[str, int]], None]
"""Takes values and where they hold: step, epoch, samples."""


class Metrics:
    """Every logged value of the run so far, kept by rank 0; each checkpoint holds a copy.

    Args:
        resumed: the files of the checkpoint that the run goes on from, or None.
    """

    def __init__(self, resumed: Path | None) -> None:
        path = resumed / METRICS_FILE if resumed else None
        found = pq.read_table(path) if path and path.exists() else METRICS_SCHEMA.empty_table()
        self._table = found.cast(METRICS_SCHEMA)
        self._columns: list[list[Any]] = [[] for _ in METRICS_SCHEMA]
        """Of what was noted since the table last grew."""
        self._follower: Follower | None = None

    def follow(self, follower: Follower) -> None:
        """Call `follower(values, at)` with all that is noted from now on."""
        self._follower = follower

    def add(self, values: dict[str, float], *, step: int, epoch: int, samples: int) -> None:
        """Note values that hold after `step` steps."""
        at = [[each] * len(values) for each in (step, epoch, samples, time.time())]
        new: list[list[Any]] = [*at, list(values), list(values.values())]
        for column, more in zip(self._columns, new, strict=True):
            column += more
        if self._follower is not None and values:
            self._follower(values, {"step": step, "epoch": epoch, "samples": samples})

    def frozen(self) -> "Metrics":
        """Return what is noted by now; later values do not reach it."""
        self._fold()
        copied = Metrics(None)
        copied._table = self._table
        return copied

    def encode(self) -> bytes:
        """Return the content of `metrics.parquet`."""
        self._fold()
        return _encode(self._table)

    def _fold(self) -> None:
        """Let the table grow: of rows in Python, each save would convert all there ever were.

        That took the step loop's interpreter for 0.5 s at 400,000 rows.
        """
        if not self._columns[0]:
            return
        new = pa.table(self._columns, schema=METRICS_SCHEMA)
        self._table = pa.concat_tables([self._table, new])
        self._columns = [[] for _ in METRICS_SCHEMA]
        if self._table.column(0).num_chunks > _MAX_CHUNKS:
            self._table = self._table.combine_chunks()


@dataclasses.dataclass
class Part:
    """The samples that one worker consumed in the steps before one save."""

    rank: int
    step: int
    rows: list[dict[str, Any]]
    written: bool = False

    def write(self, run: str) -> None:
        """Write them, under a name that a second try writes over."""
        folder = storage.join(run, "samples", f"step-{self.step:08d}")
        content = _encode(pa.Table.from_pylist(self.rows, schema=_SAMPLES_SCHEMA))
        storage.write_atomic(storage.join(folder, f"rank-{self.rank:05d}.parquet"), content)
        self.written = True


@dataclasses.dataclass
class Consumed:
    """What this worker consumed that no committed checkpoint covers yet."""

    rank: int
    samples_per_epoch: int
    audit: bool
    bad: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    _rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    _parts: list[Part] = dataclasses.field(default_factory=list)

    def add(self, batch: MicroBatch, *, step: int) -> None:
        """Note a micro-batch of the step that ends as number `step`."""
        self.bad += batch.bad
        if self.audit:
            self._rows += [
                {
                    "epoch": position // self.samples_per_epoch,
                    "step": step,
                    "rank": self.rank,
                    "id": i,
                }
                for position, i in zip(batch.positions, batch.ids, strict=True)
            ]

    def cut(self, step: int) -> list[Part]:
        """Return what a save after `step` steps must write: also what an earlier one failed to."""
        self._parts = [part for part in self._parts if not part.written]
        if self._rows:
            self._parts.append(Part(self.rank, step, self._rows))
            self._rows = []
        return list(self._parts)


class Quarantine:
    """The run's bad images, each once, kept by rank 0; each checkpoint holds a copy.

    Args:
        resumed: the files of the checkpoint that the run goes on from, or None.
    """

    def __init__(self, resumed: Path | None) -> None:
        rows = _read(resumed / QUARANTINE_FILE) if resumed else []
        # By place: two data sets of a mix may use one id for different images.
        self._rows = {row["uri"]: row for row in rows}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Note bad images; return the new ones."""
        new = list({row["uri"]: row for row in rows if row["uri"] not in self._rows}.values())
        self._rows |= {row["uri"]: row for row in new}
        return new

    def encode(self) -> bytes:
        """Return the content of `quarantine.parquet`."""
        rows = list(self._rows.values())
        return _encode(pa.Table.from_pylist(rows, schema=_QUARANTINE_SCHEMA))


def upload_logs(run: str, logger: Logger | None) -> None:
    """Copy TensorBoard's files to the run folder where that is no local path."""
    if isinstance(logger, TensorBoardLogger) and storage.is_remote(run):
        logger.experiment.flush()
        # Not trainer.log_dir: that is a collective, and only rank 0 is here.
        store_files(Path(logger.log_dir), storage.join(run, "tensorboard"))
