"""What a resubmission may not change, and what a cluster that may grow changes."""

import dataclasses
from pathlib import Path

import pytest
from packed import write_packed

from orchestrator.config import Config, DataConfig, TrainConfig, UserError
from orchestrator.data.index import Index
from orchestrator.train import checkpoint, preflight
from orchestrator.train.checkpoint import Manifest
from orchestrator.train.preflight import Resources


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_packed(tmp_path / "data", train=40, val=10)


def make_config(index: Index, tmp_path: Path, *, max_epochs: int) -> Config:
    return Config(
        name="run",
        storage_path=str(tmp_path),
        data=DataConfig(index=index.uri, global_batch=7),
        train=TrainConfig(max_epochs=max_epochs),
    )


def commit(run: str, index: Index, *, step: int, position: int, epoch: int, done: str) -> None:
    manifest = Manifest(
        step=step, position=position, epoch=epoch, metrics={}, done=done, world_size=1,
        strategy="ddp", precision="32", config_digest="", index_digest=index.digest,
        stats={}, files=(),
    )  # fmt: skip
    checkpoint.commit(run, manifest)


def test_a_run_whose_last_step_was_short_cannot_be_made_longer(
    index: Index, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    commit(run, index, step=12, position=80, epoch=2, done="max_epochs")
    config = make_config(index, tmp_path, max_epochs=2)
    preflight.check_checkpoints(config, index, run)
    assert preflight.is_finished(config, run)
    with pytest.raises(UserError, match=r"train\.max_epochs=3: the last step .* was shorter"):
        preflight.check_checkpoints(make_config(index, tmp_path, max_epochs=3), index, run)


def test_fewer_epochs_than_are_done_are_refused(index: Index, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    commit(run, index, step=8, position=56, epoch=1, done="")
    preflight.check_checkpoints(make_config(index, tmp_path, max_epochs=2), index, run)
    with pytest.raises(UserError, match=r"train\.max_epochs=1 ends before the checkpoint"):
        preflight.check_checkpoints(make_config(index, tmp_path, max_epochs=1), index, run)


@pytest.mark.parametrize("done", ["converged", "diverged"])
def test_a_run_that_stopped_itself_is_finished_whatever_its_epochs(
    index: Index, tmp_path: Path, done: str
) -> None:
    run = str(tmp_path / "run")
    commit(run, index, step=6, position=42, epoch=1, done=done)
    assert preflight.is_finished(make_config(index, tmp_path, max_epochs=9), run)


def test_workers_wait_for_a_cluster_that_may_grow_and_for_no_other(
    index: Index, tmp_path: Path
) -> None:
    config = make_config(index, tmp_path, max_epochs=1)
    scaling = dataclasses.replace(config.scaling, num_workers=4)
    config = dataclasses.replace(config, scaling=scaling)
    empty = Resources(cpus=0, gpus=0)
    preflight.check_resources(config, empty, may_grow=True)
    assert "needs 4 CPUs" in (preflight.describe_waiting(config, empty) or "")
    assert preflight.describe_waiting(config, Resources(cpus=4, gpus=0)) is None
    with pytest.raises(UserError, match=r"scaling\.num_workers=4 needs 4 CPUs"):
        preflight.check_resources(config, empty, may_grow=False)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_torch_would_refuse_is_refused_first(
    index: Index, tmp_path: Path, seed: int
) -> None:
    config = dataclasses.replace(make_config(index, tmp_path, max_epochs=1), seed=seed)
    with pytest.raises(UserError, match=r"seed=.* must be from 0 to 4294967295"):
        preflight.check_config(config)
