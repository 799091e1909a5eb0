"""ZeRO 1, 2 and 3 for real: DeepSpeed on CPUs with gloo, beside DDP on the same stream."""

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packed import write_packed

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    Strategy,
    TrainConfig,
)
from orchestrator.data.index import Index
from orchestrator.run import METRICS_FILE, read_events
from orchestrator.train.launch import RunResult, TrainingFailed, fit
from orchestrator.train.saving import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_packed(tmp_path_factory.mktemp("data"), train=75, val=12)


def make_config(index: Index, folder: Path, strategy: Strategy) -> Config:
    marker = folder / f"{strategy}.marker"
    return Config(
        name=strategy,
        storage_path=str(folder),
        data=DataConfig(
            index=index.uri, global_batch=13, max_micro_batch=4, image_size=8, window_chunks=3
        ),
        model=ModelConfig(
            class_path="modules.NoDropout", init_args={"marker": str(marker), "at_step": 8}
        ),
        train=TrainConfig(
            max_epochs=2,
            precision="32",
            strategy=strategy,
            checkpoint=CheckpointConfig(every_steps=3),
            max_failures=0,
        ),
        scaling=ScalingConfig(num_workers=2),
    )


@pytest.fixture(scope="module")
def ddp(data: Index, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = make_config(data, tmp_path_factory.mktemp("ddp"), "ddp")
    Path(config.model.init_args["marker"]).touch()  # never fails
    return fit(config)


def train_losses(result: RunResult) -> dict[int, float]:
    """Return the curve of a run: step -> mean loss of the steps since the one before."""
    rows = pq.read_table(Path(result.run) / METRICS_FILE).to_pylist()
    return {row["step"]: row["value"] for row in rows if row["name"] == "train_loss"}


@pytest.mark.parametrize(("strategy", "then"), [("zero1", 2), ("zero2", 1), ("zero3", 1)])
def test_it_trains_fails_resumes_and_agrees_with_ddp(
    data: Index, tmp_path: Path, ddp: RunResult, strategy: Strategy, then: int
) -> None:
    config = make_config(data, tmp_path, strategy)
    with pytest.raises(TrainingFailed, match="went to pieces"):
        fit(config)
    config = dataclasses.replace(config, scaling=ScalingConfig(num_workers=then))
    result = fit(config)
    starts = [event for event in read_events(result.run) if event["event"] == "training"]
    assert [(start["step"], start["workers"]) for start in starts] == [(0, 2), (6, then)]
    assert result.result["steps"] == 12
    manifest = checkpoint.list_manifests(result.run)[-1]
    assert manifest.strategy == strategy
    assert sum(record.name.startswith("zero-rank-") for record in manifest.files) == then
    # The same fp32 numbers added in another order, over 12 steps of plain SGD at lr 0.5.
    ours, theirs = train_losses(result), train_losses(ddp)
    assert list(theirs) == [5, 6, 10, 12]
    assert ours == pytest.approx(theirs, rel=1e-4)
    for which in ("best", "final"):
        ended = [run.result[which]["val_loss"] for run in (result, ddp)]
        assert ended[0] == pytest.approx(ended[1], rel=1e-4)
