"""What a resubmission may not change, and what a cluster that may grow changes."""

import dataclasses
import math
from pathlib import Path

import pytest
from packed import write_packed

from orchestrator.config import (
    BesideConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    TrainConfig,
    UserError,
    ValidateConfig,
)
from orchestrator.data.index import Index
from orchestrator.train import preflight
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
    with pytest.raises(UserError, match=r"scaling\.cpus_per_worker=1 needs 4 CPUs"):
        preflight.check_resources(config, empty, may_grow=False)
    with pytest.raises(UserError, match=r"scaling\.num_workers=4 needs 4 CPUs but .* has 2"):
        preflight.check_resources(config, Resources(cpus=2, gpus=0), may_grow=False)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_torch_would_refuse_is_refused_first(
    index: Index, tmp_path: Path, seed: int
) -> None:
    config = dataclasses.replace(make_config(index, tmp_path, max_epochs=1), seed=seed)
    with pytest.raises(UserError, match=r"seed=.* must be from 0 to 4294967295"):
        preflight.check_config(config)


@pytest.mark.parametrize(("field", "value"), [("max_failures", -1), ("hang_timeout_s", 0.0)])
def test_how_often_and_how_long_to_wait_is_checked(
    index: Index, tmp_path: Path, field: str, value: float
) -> None:
    config = make_config(index, tmp_path, max_epochs=1)
    train = dataclasses.replace(config.train, **{field: value})
    with pytest.raises(UserError, match=rf"train\.{field}=.* must be"):
        preflight.check_config(dataclasses.replace(config, train=train))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (ValidateConfig(every_samples=0), r"train\.validate\.every_samples=0 must be at least 1"),
        (
            ValidateConfig(beside=BesideConfig(cpus=0)),
            r"train\.validate\.beside\.cpus=0 must be above 0",
        ),
        (
            ValidateConfig(beside=BesideConfig(gpus=-1)),
            r"train\.validate\.beside\.gpus=-1 must be at least 0",
        ),
        (
            EarlyStoppingConfig(min_delta=-0.5),
            r"early_stopping\.min_delta=-0\.5 must be a number from 0 on",
        ),
        (
            EarlyStoppingConfig(min_delta=math.nan),
            r"early_stopping\.min_delta=nan must be a number from 0 on",
        ),
        (
            EarlyStoppingConfig(divergence_threshold=math.nan),
            r"divergence_threshold=nan must be a number, or null",
        ),
    ],
)
def test_validation_and_stopping_that_cannot_be_are_refused(
    index: Index, tmp_path: Path, changes: ValidateConfig | EarlyStoppingConfig, said: str
) -> None:
    config = make_config(index, tmp_path, max_epochs=1)
    name = "validate" if isinstance(changes, ValidateConfig) else "early_stopping"
    train = dataclasses.replace(config.train, **{name: changes})
    with pytest.raises(UserError, match=said):
        preflight.check_config(dataclasses.replace(config, train=train))


def test_a_network_that_needs_values_to_be_built_is_no_mistake(
    index: Index, tmp_path: Path
) -> None:
    args = {"arch": "regnet_y_400mf"}
    config = make_config(index, tmp_path, max_epochs=1)
    model = dataclasses.replace(
        config.model,
        class_path="orchestrator.train.module.ImageClassifier",
        init_args=args,
    )
    preflight.check_model(dataclasses.replace(config, model=model), index)
    args["arch"] = "regnet_y_400m"
    with pytest.raises(UserError, match="regnet_y_400m"):
        preflight.check_model(dataclasses.replace(config, model=model), index)


def test_validation_needs_images(tmp_path: Path) -> None:
    config = make_config(write_packed(tmp_path / "data", train=40, val=0), tmp_path, max_epochs=1)
    train = TrainConfig(early_stopping=None, validate=ValidateConfig(every_samples=7))
    with pytest.raises(UserError, match=r"train\.validate\.every_samples needs validation images"):
        preflight.check_data(dataclasses.replace(config, train=train))


def test_a_metric_that_the_classifier_never_logs_is_refused_at_once(
    index: Index, tmp_path: Path
) -> None:
    config = make_config(index, tmp_path, max_epochs=1)
    train = TrainConfig(early_stopping=EarlyStoppingConfig(monitor="val_los"))
    with pytest.raises(UserError, match=r"'val_los' is never logged.* did you mean 'val_loss'\?"):
        preflight.check_model(dataclasses.replace(config, train=train), index)


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        ([4], True),
        ([3], False),
        ([1, 1, 1, 1], False),  # the process is not spread over two nodes
        ([2, 1, 1], True),
        ([2, 2], True),
        ([3, 0.5], False),
    ],
)
def test_validation_beside_the_workers_needs_a_node_with_room(
    index: Index, tmp_path: Path, nodes: list[float], fits: bool
) -> None:
    config = make_config(index, tmp_path, max_epochs=1)
    train = dataclasses.replace(
        config.train, validate=ValidateConfig(beside=BesideConfig(cpus=2, gpus=0))
    )
    scaling = dataclasses.replace(config.scaling, num_workers=2)
    config = dataclasses.replace(config, train=train, scaling=scaling)
    found = Resources(cpus=sum(nodes), gpus=0, nodes=tuple({"CPU": n} for n in nodes))
    preflight.check_resources(config, found, may_grow=True)
    if fits:
        preflight.check_resources(config, found, may_grow=False)
        return
    with pytest.raises(UserError, match=r"beside=\{cpus: 2, gpus: 0\} finds no place on any of"):
        preflight.check_resources(config, found, may_grow=False)
