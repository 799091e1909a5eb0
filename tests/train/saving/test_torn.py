"""Every file at a run's root, torn or altered: it is made again, or named in one sentence."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import saves
import torch
from packed import write_packed

from orchestrator.config import Config, DataConfig, ModelConfig, TrainConfig, UserError
from orchestrator.overrides import identity
from orchestrator.run import append_event, check_same_run, open_run, read_events, write_result
from orchestrator.train.launch import fit
from orchestrator.train.saving import checkpoint

STEPS = 6


def tear(path: Path, damage: str) -> None:
    """Leave nothing of a file, or half, or turn one bit in its middle."""
    content, middle = path.read_bytes(), path.stat().st_size // 2
    left = {
        "empty": b"",
        "half": content[:middle],
        "flip": content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :],
    }
    path.write_bytes(left[damage])


damages = pytest.mark.parametrize("damage", ["empty", "half", "flip"])


class Saved(pl.LightningModule):
    """A module of the state that `saves` saves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Module()
        self.net.register_buffer("weight", torch.zeros(64))
        self.net.register_buffer("bias", torch.zeros(3))

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net.weight.sum())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A finished run of 10 samples, as its folder lies there; nothing of Ray ran."""
    folder = tmp_path_factory.mktemp("torn")
    index = write_packed(folder / "data", train=STEPS * saves.WORKERS, val=4)
    config = Config(
        name="run",
        storage_path=str(folder),
        data=DataConfig(index=index.uri, global_batch=saves.WORKERS),
        model=ModelConfig(class_path=f"{__name__}.Saved"),
        train=TrainConfig(max_epochs=1),
    )
    run = open_run(config)
    of_run = {"index_digest": index.digest, "settings": identity(config)}
    saves.train(run, steps=STEPS, every=2, epoch=1, **of_run)
    append_event(run, "finished")
    write_result(run, {"stop_reason": "max_epochs", "steps": STEPS})
    return config, Path(run)


@pytest.fixture
def run(finished: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    """A copy of that run, to be torn."""
    config, folder = finished
    copy = tmp_path / "runs" / "run"
    shutil.copytree(folder, copy)
    return Config(**{**vars(config), "storage_path": str(copy.parent)}), copy


@damages
def test_a_torn_config_is_named(run: tuple[Config, Path], damage: str) -> None:
    config, folder = run
    path = folder / "config.yaml"
    check_same_run(config)
    tear(path, damage)
    with pytest.raises(UserError, match=r"config\.yaml is damaged: .*; restore it, or delete") as e:
        fit(config)
    assert str(path) in str(e.value)
    path.unlink()
    assert fit(config).result["steps"] == STEPS


@damages
def test_torn_events_cost_only_their_own_lines(run: tuple[Config, Path], damage: str) -> None:
    _, folder = run
    tear(folder / "events.jsonl", damage)
    left = [event["event"] for event in read_events(str(folder))]
    assert len(left) < 2 or damage == "flip"  # a letter in a text may have changed
    append_event(str(folder), "later")
    assert [event["event"] for event in read_events(str(folder))] == [*left, "later"]


@pytest.mark.parametrize("damage", ["empty", "half"])
def test_a_torn_result_is_written_again(run: tuple[Config, Path], damage: str) -> None:
    config, folder = run
    tear(folder / "result.json", damage)
    assert fit(config).result["steps"] == STEPS
    assert json.loads((folder / "result.json").read_text())["stop_reason"] == "max_epochs"


@damages
@pytest.mark.parametrize("name", ["metrics.parquet", "quarantine.parquet"])
def test_torn_tables_come_back_from_the_checkpoint(
    run: tuple[Config, Path], tmp_path: Path, damage: str, name: str
) -> None:
    _, folder = run
    checkpoint.delete(str(folder), STEPS)  # the run was killed before its end
    whole = pq.read_table(folder / name).to_pylist()
    tear(folder / name, damage)
    assert saves.resume(str(folder), tmp_path / "to", steps=STEPS, every=2) == STEPS - 2
    saves.assert_complete(str(folder), steps=STEPS)
    found = pq.read_table(folder / name).to_pylist()
    for row in [*whole, *found]:
        row.pop("time", None)
    assert found == whole


@damages
def test_a_torn_newest_manifest_costs_one_checkpoint(
    run: tuple[Config, Path], tmp_path: Path, damage: str
) -> None:
    _, folder = run
    tear(Path(checkpoint.checkpoint_uri(str(folder), STEPS)) / "MANIFEST.json", damage)
    assert saves.resume(str(folder), tmp_path / "to", steps=STEPS, every=2) == STEPS - 2
    saves.assert_complete(str(folder), steps=STEPS)


@damages
@pytest.mark.parametrize("name", ["weights.safetensors", "trainer.pt", "metrics.parquet"])
def test_a_torn_state_file_costs_one_checkpoint(
    run: tuple[Config, Path], tmp_path: Path, damage: str, name: str
) -> None:
    _, folder = run
    path = Path(checkpoint.checkpoint_uri(str(folder), STEPS)) / name
    tear(path, damage)
    manifests = checkpoint.survey(str(folder)).manifests
    found, problems = checkpoint.fetch_newest(str(folder), manifests, tmp_path / "fetched")
    assert found.step == STEPS - 2
    assert str(path) in problems[0]
    assert saves.resume(str(folder), tmp_path / "to", steps=STEPS, every=2) == STEPS - 2
    saves.assert_complete(str(folder), steps=STEPS)
