"""Runs that cannot work: one sentence before workers start, exit code 2, the folder as it was."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused

from orchestrator import configfile, run
from orchestrator.config import Config
from orchestrator.data.index import read_index
from orchestrator.overrides import config_digest, identity, with_overrides
from orchestrator.train import model
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import MANIFEST_FILE, Manifest
from orchestrator.train.strategies.tensors import WEIGHTS_FILE, write_weights


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command that would start Ray fail."""
    monkeypatch.delattr("orchestrator.cluster.connect")


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            "--train.strategy zero2 --train.offload_optimizer true",
            r"offload_optimizer=true moves .*gpus_per_worker=0; leave it out",
        ),
        ("--scaling.num_workers '[4, 2]'", r"num_workers=\[4, 2\] must ascend: .*; swap them"),
        ("--scaling.num_workers two", r"'scaling\.num_workers': 'two' is neither a whole number"),
        (
            "--train.early_stopping.monitor val_los",
            r"monitor='val_los' is never logged: .*ImageClassifier logs .*mean 'val_loss'\?",
        ),
        ("--storage_path {root}/config.yaml/runs", r"/config\.yaml/runs"),
        ("--storage_path /proc/runs", r"/proc/runs"),
    ],
)
def test_a_run_that_cannot_start_is_refused(
    config: str, tmp_path: Path, refused: Refused, flags: str, match: str
) -> None:
    refused("train", "--config", config, *shlex.split(flags.format(root=tmp_path)), match=match)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            "--scaling.num_workers 3",
            r"num_workers=3 needs 3 CPUs but this cluster has 2, .*; lower",
        ),
        (
            "--scaling.cpus_per_worker 3",
            r"scaling\.cpus_per_worker=3 needs 3 CPUs but .* has 2, .*; lower it",
        ),
        (
            "--scaling.gpus_per_worker 1",
            r"scaling\.gpus_per_worker=1 needs 1 GPUs but .* has 0, .*; lower it",
        ),
    ],
)
def test_what_no_node_has_is_refused(config: str, refused: Refused, flags: str, match: str) -> None:
    refused("train", "--config", config, *shlex.split(flags), match=match)


def commit(config: Config, path: Path, **changes: Any) -> Path:
    """Write a run's checkpoint of step 2; return its folder."""
    manifest = Manifest(
        step=2, position=16, epoch=0, metrics={}, done="", world_size=1, strategy="ddp",
        precision="32", config_digest=config_digest(config), files=(), stats={},
        index_digest=read_index(config.data.index).digest, settings=identity(config),
    )  # fmt: skip
    location = f"{path}/runs/first"
    checkpoint.commit(location, dataclasses.replace(manifest, **changes))
    return Path(checkpoint.checkpoint_uri(location, 2))


def foreign_index(config: Config, path: Path) -> None:
    commit(config, path, index_digest="0" * 64)


def foreign_config(config: Config, path: Path) -> None:
    commit(config, path, settings=identity(with_overrides(config, {"seed": 3})))


def foreign_position(config: Config, path: Path) -> None:
    commit(config, path, position=12)


def another_model(config: Config, path: Path) -> None:
    folder = commit(config, path)
    weights = model.build(config.model, num_classes=7).state_dict()
    write_weights(weights, folder / WEIGHTS_FILE)


def torn(config: Config, path: Path) -> None:
    manifest = commit(config, path) / MANIFEST_FILE
    manifest.write_bytes(manifest.read_bytes()[:100])


def altered(config: Config, path: Path) -> None:
    manifest = commit(config, path) / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))


def no_manifest(config: Config, path: Path) -> None:
    (commit(config, path) / MANIFEST_FILE).write_text("[1, 2]")


def older(config: Config, path: Path) -> None:
    manifest = commit(config, path) / MANIFEST_FILE
    manifest.write_text('{"format": 1, "step": 2}')


def other_config(config: Config, path: Path) -> None:
    run.open_run(with_overrides(config, {"seed": 3}))


def torn_config(config: Config, path: Path) -> None:
    file = Path(run.open_run(config), run.CONFIG_FILE)
    file.write_bytes(file.read_bytes()[:-70])


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (foreign_index, r"was trained on a data set with digest 000000000000 but .*; give this"),
        (foreign_config, r"step 2 in .* is of another config: seed was 3 and is now 0; give"),
        (foreign_position, r"says that 12 samples were consumed, .*global_batch=8; restore it"),
        (another_model, r"is of another model than .*: .*has shape \[7\] there and \[3\] in the"),
        (torn, r"no checkpoint of .* is whole \(.*MANIFEST\.json is damaged: .*\); restore one"),
        (altered, r"MANIFEST\.json is damaged: it does not have its own checksum\); restore one"),
        (no_manifest, r"no checkpoint of .* is whole \(.*MANIFEST\.json is damaged: .*; restore"),
        (older, r"MANIFEST\.json has format 1, not 2; use the version of orchestrator that wrote"),
        (other_config, r"belongs to another config: seed was 3 and is now 0; give this run"),
        (torn_config, r"config\.yaml is damaged: .*; restore it, or delete it to go on"),
    ],
)
def test_a_folder_that_is_not_this_runs_is_refused(
    config: str,
    tmp_path: Path,
    refused: Refused,
    spoil: Callable[[Config, Path], None],
    match: str,
) -> None:
    spoil(configfile.load(config), tmp_path)
    refused("train", "--config", config, match=match)
