"""Worker side: what a run writes down about itself: metrics, consumed samples, bad images."""

import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from orchestrator import storage
from orchestrator.config import Config
from orchestrator.data.batch import MicroBatch
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE
from orchestrator.train.checkpoint import store_files

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


def _write(uri: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    storage.write_atomic(uri, buffer.getvalue())


def _read(uri: str) -> list[dict[str, Any]]:
    if not storage.exists(uri):
        return []
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
    return rows


class Metrics:
    """The run's `metrics.parquet`, kept in memory by rank 0 and written at each commit."""

    def __init__(self, run: str, *, step: int) -> None:
        self._uri = storage.join(run, METRICS_FILE)
        self._rows = [row for row in _read(self._uri) if row["step"] <= step]

    def add(self, values: dict[str, float], *, step: int, epoch: int, samples: int) -> None:
        """Note values that hold after `step` steps."""
        at = {"step": step, "epoch": epoch, "samples": samples, "time": time.time()}
        self._rows += [{**at, "name": name, "value": value} for name, value in values.items()]

    def write(self) -> None:
        """Write all rows."""
        _write(self._uri, self._rows, METRICS_SCHEMA)


@dataclasses.dataclass
class Consumed:
    """What this worker consumed since the last commit."""

    rank: int
    samples_per_epoch: int
    audit: bool
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bad: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, batch: MicroBatch, *, step: int) -> None:
        """Note a micro-batch of the step that ends as number `step`."""
        self.bad += batch.bad
        if self.audit:
            self.rows += [
                {
                    "epoch": position // self.samples_per_epoch,
                    "step": step,
                    "rank": self.rank,
                    "id": i,
                }
                for position, i in zip(batch.positions, batch.ids, strict=True)
            ]

    def write(self, run: str, *, step: int) -> None:
        """Write the consumed samples as part of the commit of `step`, and start anew."""
        if self.audit:
            name = f"rank-{self.rank:05d}.parquet"
            uri = storage.join(run, "samples", f"step-{step:08d}", name)
            _write(uri, self.rows, _SAMPLES_SCHEMA)
        self.rows = []


class Quarantine:
    """The run's `quarantine.parquet`: each bad image once, kept by rank 0."""

    def __init__(self, run: str) -> None:
        self._uri = storage.join(run, QUARANTINE_FILE)
        self._rows = {row["id"]: row for row in _read(self._uri)}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Note bad images and write the table if any is new; return the new ones."""
        new = list({row["id"]: row for row in rows if row["id"] not in self._rows}.values())
        self._rows |= {row["id"]: row for row in new}
        if new:
            _write(self._uri, list(self._rows.values()), _QUARANTINE_SCHEMA)
        return new


def upload_logs(run: str, logger: Logger | None) -> None:
    """Copy TensorBoard's files to the run folder where that is no local path."""
    if isinstance(logger, TensorBoardLogger) and storage.is_remote(run):
        logger.experiment.flush()
        # Not trainer.log_dir: that is a collective, and only rank 0 is here.
        store_files(Path(logger.log_dir), storage.join(run, "tensorboard"))
