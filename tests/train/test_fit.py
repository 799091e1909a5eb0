"""Real runs on a real Ray cluster: two workers, gloo, kills, resumes, bad images."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from packed import write_packed

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
    UserError,
)
from orchestrator.data.index import Index
from orchestrator.evaluate import evaluate
from orchestrator.run import read_events, read_result
from orchestrator.train.launch import RunResult, TrainingFailed, fit
from orchestrator.train.saving import checkpoint
from orchestrator.train.strategies.strategy import WEIGHTS_FILE, read_tensors
from orchestrator.train.timing.timeline import PARTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]
TRAIN, EPOCHS = 75, 3  # 75 is no multiple of the global batch: steps straddle epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_packed(tmp_path_factory.mktemp("data"), train=TRAIN, val=11)


def make_config(
    index: Index, folder: Path, name: str, module: str, *, workers: int = 2, **init_args: object
) -> Config:
    return Config(
        name=name,
        storage_path=str(folder),
        data=DataConfig(
            index=index.uri,
            global_batch=13,
            max_micro_batch=4,
            eval_batch=4,
            image_size=8,
            window_chunks=3,
            audit=True,
        ),
        model=ModelConfig(class_path=f"modules.{module}", init_args=dict(init_args)),
        train=TrainConfig(
            max_epochs=EPOCHS,
            precision="32",
            checkpoint=CheckpointConfig(every_steps=2),
            max_failures=0,
        ),
        scaling=ScalingConfig(num_workers=workers),
    )


def replace_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def final_weights(result: RunResult) -> dict[str, torch.Tensor]:
    last = checkpoint.list_manifests(result.run)[-1]
    uri = checkpoint.checkpoint_uri(result.run, last.step)
    weights: dict[str, torch.Tensor] = read_tensors(Path(uri) / WEIGHTS_FILE)
    return weights


def audit(result: RunResult) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(f"{result.run}/samples").to_pylist()
    return sorted(rows, key=lambda row: (row["step"], row["rank"]))


def assert_exactly_once(result: RunResult, *, missing: frozenset[str] = frozenset()) -> None:
    counts = Counter((row["epoch"], row["id"]) for row in audit(result))
    expected = {f"train-{i:04d}" for i in range(TRAIN)} - missing
    assert set(counts.values()) == {1}
    assert set(counts) == {(epoch, i) for epoch in range(EPOCHS) for i in expected}


def assert_accounted(result: RunResult) -> None:
    """Check that the run's seconds are known by part, and that something is said of them."""
    found = result.result
    assert set(found["time"]) == set(PARTS)
    assert min(found["time"].values()) >= 0
    # Workers get their first batch at slightly different times.
    assert abs(found["unattributed_s"]) < 0.5 + 0.02 * found["allocated_s"]
    assert 0 < found["ettr"] < 1
    assert re.match(r"[a-z- ]+: .*\.$", found["verdict"])


@pytest.fixture(scope="module")
def undisturbed(data: Index, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunResult]:
    config = make_config(data, tmp_path_factory.mktemp("runs"), "undisturbed", "UserModule")
    return config, fit(config)


def test_a_run_writes_all_that_its_folder_promises(undisturbed: tuple[Config, RunResult]) -> None:
    config, result = undisturbed
    run = Path(result.run)
    steps = -(-TRAIN * EPOCHS // 13)
    assert result.stop_reason == "max_epochs"
    assert result.result["epochs"] == EPOCHS
    assert result.result["steps"] == steps
    assert result.result["samples_seen"] == TRAIN * EPOCHS
    assert result.result["restarts"] == 0
    assert 0 <= result.result["data_wait_share"] <= 1
    assert_accounted(result)
    assert result.best["val_loss"] <= result.result["final"]["val_loss"]
    assert list((run / "tensorboard").glob("events*"))
    metrics = pq.read_table(run / "metrics.parquet").to_pylist()
    assert [m["step"] for m in metrics if m["name"] == "val_loss"] == [6, 12, steps]
    assert {m["name"] for m in metrics} >= {"train_loss", "lr", "val_loss"}
    kept = [manifest.step for manifest in checkpoint.list_manifests(result.run)]
    assert kept[-1] == steps
    assert len(kept) <= config.train.checkpoint.keep + 1
    assert result.best["step"] in kept
    assert_exactly_once(result)


def test_a_finished_run_resubmitted_starts_nothing(undisturbed: tuple[Config, RunResult]) -> None:
    config, result = undisturbed
    events = read_events(result.run)
    assert fit(config).result == result.result
    assert read_events(result.run) == events


def test_epochs_lowered_to_those_done_end_the_run(
    undisturbed: tuple[Config, RunResult], tmp_path: Path
) -> None:
    config, result = undisturbed
    run = str(shutil.copytree(result.run, tmp_path / config.name))
    config = dataclasses.replace(config, storage_path=str(tmp_path))
    # As where more epochs were asked for, and this one's end was committed.
    checkpoint.amend(run, result.result["steps"], done="")
    ended = fit(config)
    assert ended.stop_reason == "max_epochs"
    assert ended.result["steps"] == result.result["steps"]
    events = read_events(run)
    assert [event["event"] for event in events].count("training") == 1
    assert fit(config).result == ended.result
    assert read_events(run) == events


def test_a_killed_worker_costs_nothing_but_time(
    data: Index, tmp_path: Path, undisturbed: tuple[Config, RunResult]
) -> None:
    marker = str(tmp_path / "killed.marker")
    config = make_config(data, tmp_path, "killed", "KilledOnce", marker=marker, at_step=9)
    result = fit(replace_train(config, max_failures=1))
    assert Path(marker).exists()
    assert result.result["restarts"] == 1
    assert_accounted(result)
    assert result.result["time"]["restart"] > 1
    starts = [event["step"] for event in read_events(result.run) if event["event"] == "training"]
    assert starts == [0, 8]
    expected = final_weights(undisturbed[1])
    weights = final_weights(result)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert_exactly_once(result)
    assert audit(result) == audit(undisturbed[1])


def test_an_error_is_one_line_and_the_run_resumes_at_another_world_size(
    data: Index, tmp_path: Path
) -> None:
    marker = str(tmp_path / "failed.marker")
    config = make_config(data, tmp_path, "fails", "NoDropout", marker=marker, at_step=9)
    with pytest.raises(TrainingFailed, match="ArithmeticError: the loss went to pieces") as caught:
        fit(config)
    assert "\n" not in str(caught.value)
    assert "Traceback" in (tmp_path / "fails" / "error.txt").read_text()
    failed = read_result(str(tmp_path / "fails"))
    assert failed is not None
    assert (failed["stop_reason"], failed["steps"]) == ("failed", 8)
    assert "ArithmeticError: the loss went to pieces" in failed["problem"]
    alone = dataclasses.replace(config, scaling=ScalingConfig(num_workers=1))
    resumed = fit(alone)
    assert_exactly_once(resumed)
    ranks = {(row["step"] > 8, row["rank"]) for row in audit(resumed)}
    assert ranks == {(False, 0), (False, 1), (True, 0)}
    # The optimisation problem does not depend on the world size (P3): one worker from the start
    # ends at the same weights, up to the rounding of sums in another order.
    single = fit(dataclasses.replace(alone, name="single"))
    expected, weights = final_weights(single), final_weights(resumed)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-5)


def test_early_stopping_keeps_the_best_checkpoint(data: Index, tmp_path: Path) -> None:
    config = make_config(data, tmp_path, "stops", "NeverImproves")
    stopping = EarlyStoppingConfig(patience=1)
    config = replace_train(
        config, max_epochs=9, early_stopping=stopping, checkpoint=CheckpointConfig(keep=1)
    )
    result = fit(config)
    assert result.stop_reason == "converged"
    assert result.result["epochs"] == 2
    assert result.best == {"val_loss": 0.0, "epoch": 1, "step": 6}
    assert [m.step for m in checkpoint.list_manifests(result.run)] == [6, 12]


def test_broken_images_are_quarantined_and_counted(tmp_path: Path) -> None:
    broken = {"train-0007": b"not an image", "train-0050": b"\xff\xd8\xff\xe0 half a header"}
    broken["val-0002"] = b""
    index = write_packed(tmp_path / "data", train=TRAIN, val=11, broken=broken)
    config = make_config(index, tmp_path, "broken", "UserModule")
    result = fit(config)
    assert result.stop_reason == "max_epochs"
    assert result.result["quarantined"] == 3
    table = pq.read_table(f"{result.run}/quarantine.parquet").to_pylist()
    assert sorted(row["id"] for row in table) == sorted(broken)
    assert all(row["reason"] and row["uri"].startswith(index.uri) for row in table)
    assert_exactly_once(result, missing=frozenset(broken) - {"val-0002"})


def test_a_run_stops_where_too_many_images_are_bad(tmp_path: Path) -> None:
    broken = {f"train-{i:04d}": b"<html>gone</html>" for i in range(0, 10_200, 50)}
    index = write_packed(
        tmp_path / "data", train=10_200, val=4, chunk_rows=512, shard_rows=5_100, broken=broken
    )
    config = make_config(index, tmp_path, "rotten", "UserModule")
    data = dataclasses.replace(config.data, global_batch=512, max_micro_batch=256, audit=False)
    config = replace_train(
        dataclasses.replace(config, data=data), checkpoint=CheckpointConfig(every_steps=None)
    )
    with pytest.raises(UserError, match=r"not_an_image 2\d\d.*data\.max_bad_fraction=0\.01"):
        fit(config)
    table = pq.read_table(f"{tmp_path}/rotten/quarantine.parquet").to_pylist()
    assert {row["first_bytes"] for row in table} == {b"<html>gone</html>"[:16].hex()}
    assert len(table) >= 200
    assert len({row["id"] for row in table}) == len(table)


def test_a_monitor_that_is_never_logged_is_said_in_one_line(data: Index, tmp_path: Path) -> None:
    config = make_config(data, tmp_path, "unlogged", "UserModule")
    config = replace_train(config, early_stopping=EarlyStoppingConfig(monitor="val_los"))
    with pytest.raises(UserError, match=r"train\.early_stopping\.monitor='val_los'.*val_loss"):
        fit(config)


def test_evaluation_counts_every_image_once(
    data: Index, undisturbed: tuple[Config, RunResult]
) -> None:
    run = undisturbed[1].run
    found = evaluate(run, which="best", split="val")
    assert (found["samples"], found["unreadable"], found["step"]) == (
        11, 0, undisturbed[1].best["step"],
    )  # fmt: skip
    assert [entry["samples"] for entry in found["classes"]] == [4, 4, 3]
    # What the module logged on two workers, with 5 and 6 of the 11 images, is the exact mean too.
    assert found["loss"] == pytest.approx(undisturbed[1].best["val_loss"], rel=1e-5)
    correct = sum(entry["correct"] for entry in found["classes"])
    assert found["accuracy"] == correct / 11
    assert json.loads(Path(run, "evaluation.json").read_text()) == found
    assert evaluate(run, which="last", split="train")["samples"] == TRAIN
    with pytest.raises(UserError, match=r"--split='test'.*--test-fraction"):
        evaluate(run, split="test")
