"""Real sweeps on a real Ray cluster of two CPUs: every way a trial can end."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from packed import write_packed

from orchestrator import configfile
from orchestrator.config import (
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
    TuneConfig,
    UserError,
)
from orchestrator.run import run_uri
from orchestrator.train import launch
from orchestrator.train.saving import checkpoint
from orchestrator.tune import sweep
from orchestrator.tune.results import Ledger, Row, SweepResult

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

MODEL = "model.init_args"
GOOD, CONVERGED, POOR, DIVERGED = 0, 2, 3, 4
FAILING = 1
CURVES: list[list[float | None]] = [
    [0.5, 0.4, 0.3, 0.2, 0.1],
    [0.05],
    [0.5, 0.4, 0.4],
    [0.9, 0.8, 0.7, 0.6, 0.55],
    [None],
]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep that ran, and what it said."""

    config: Config
    result: SweepResult
    said: list[str]
    needed: Path
    """The file without which one trial fails."""


def make_config(folder: Path, name: str, **tune: Any) -> Config:
    index = folder / "packed"
    if not index.exists():
        write_packed(index, train=24, val=8)
    return Config(
        name=name,
        storage_path=str(folder / "runs"),
        data=DataConfig(index=str(index), global_batch=12, image_size=8, eval_crop=1.0),
        model=ModelConfig(class_path="trial_modules.Scripted", init_args={"curve": [0.5]}),
        train=TrainConfig(
            max_epochs=5, early_stopping=EarlyStoppingConfig(patience=2), max_failures=0
        ),
        scaling=ScalingConfig(num_workers=1),
        tune=TuneConfig(num_samples=1, reduction_factor=2, **tune),
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Sweep:
    """Run one trial for each way to end; two at a time, so the poor one comes after others."""
    folder = tmp_path_factory.mktemp("sweep")
    needed = folder / "needed"
    cells = [
        {"curve": curve, "needs": str(needed) if n == FAILING else "", "seconds": 1.5 * (n == POOR)}
        for n, curve in enumerate(CURVES)
    ]
    config = make_config(folder, "mixed", space={MODEL: {"grid": cells}})
    said: list[str] = []
    return Sweep(config, sweep.search(config, say=said.append), said, needed)


def test_every_trial_has_one_reason_and_says_so(mixed: Sweep) -> None:
    reasons = [row.reason for row in mixed.result.rows]
    assert reasons == ["max_budget", "failed", "converged", "pruned", "failed"]
    assert len([line for line in mixed.said if line.startswith("trial ")]) == len(CURVES)
    assert "trial 0 max_budget after 5 epochs: best val_loss 0.1" in mixed.said
    assert "trial 2 converged after 4 epochs: best val_loss 0.4" in mixed.said


def test_a_failed_trial_names_its_error_in_one_line(mixed: Sweep) -> None:
    why = mixed.result.rows[FAILING].why
    assert "ArithmeticError: the loss went to pieces" in why
    assert "\n" not in why
    assert mixed.result.rows[DIVERGED].why.startswith("diverged: ")


def test_a_pruned_trial_ends_early_and_gives_back_its_workers(mixed: Sweep) -> None:
    row = mixed.result.rows[POOR]
    assert row.why.endswith("at epoch 1, where 1 may go on")
    assert checkpoint.list_manifests(row.run)[-1].epoch < 5
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}


def test_the_folder_tells_the_whole_sweep(mixed: Sweep) -> None:
    folder = Path(mixed.result.sweep)
    content = json.loads((folder / "sweep.json").read_text())
    assert (content["best_trial"], content["finished"]) == (GOOD, False)
    good = content["trials"][GOOD]
    assert [loss for _, loss in good["curve"]] == pytest.approx(CURVES[GOOD])
    assert good["metrics"] == {"val_loss": pytest.approx(0.1)}
    assert Path(good["run"], "result.json").exists()
    assert (folder / "report.md").read_text().count("| failed |") == 2
    assert sweep.format_table(mixed.result).splitlines()[1].startswith("0  ")


def test_the_best_config_is_one_that_train_takes(mixed: Sweep) -> None:
    best = configfile.load(str(Path(mixed.result.sweep, "best.yaml")))
    launch.check(best)
    assert best.model.init_args["curve"] == CURVES[GOOD]
    assert best.name == "mixed-best"


def test_another_space_under_the_same_name_is_refused(mixed: Sweep) -> None:
    assert mixed.config.tune is not None
    space = {f"{MODEL}.seconds": {"grid": [0.0]}}
    tune = dataclasses.replace(mixed.config.tune, space=space)
    with pytest.raises(UserError, match=r"belongs to another sweep: trial 0 was"):
        sweep.search(dataclasses.replace(mixed.config, tune=tune))


def test_submitted_again_only_what_failed_runs_and_then_nothing(mixed: Sweep) -> None:
    mixed.needed.touch()
    said: list[str] = []
    again = sweep.search(mixed.config, say=said.append)
    reasons = [row.reason for row in again.rows]
    assert reasons == ["max_budget", "converged", "converged", "pruned", "failed"]
    assert sorted(line[:7] for line in said) == ["trial 1", "trial 4"]
    assert again.rows[GOOD] == mixed.result.rows[GOOD]


def test_a_finished_sweep_is_returned_as_it_is(tmp_path: Path) -> None:
    config = make_config(tmp_path, "one", space={f"{MODEL}.curve": {"grid": [[0.5]]}})
    assert config.tune is not None
    uri = run_uri(config)
    row = Row(trial=0, overrides={f"{MODEL}.curve": [0.5]}, run=f"{uri}/trials/0000")
    ledger = Ledger(uri, config.tune, [row], lambda line: None)
    ledger.report(0, {"val_loss": 0.5, "epoch": 1, "step": 5})
    ledger.end(0, "converged")
    said: list[str] = []
    again = sweep.search(config, say=said.append)
    assert again.rows == ledger.result.rows
    assert said == [f"{uri} holds this sweep, finished; nothing is trained again."]
    assert not Path(row.run).exists()


def test_a_metric_that_nobody_logs_is_refused(tmp_path: Path) -> None:
    space = {f"{MODEL}.seconds": {"grid": [0.0]}}
    config = make_config(tmp_path, "metric", space=space, metric="val_los")
    with pytest.raises(UserError, match=r"tune\.metric='val_los' is not logged .*: val_loss\."):
        sweep.search(config, say=lambda line: None)


def test_workers_that_never_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    space = {f"{MODEL}.seconds": {"grid": [0.0]}}
    config = make_config(tmp_path, "wide", space=space)
    config = dataclasses.replace(config, scaling=ScalingConfig(num_workers=3))
    with pytest.raises(UserError, match=r"num_workers=3 needs 3 CPUs but this cluster has 2"):
        sweep.search(config)
