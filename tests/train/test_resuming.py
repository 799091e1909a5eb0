"""What a run may be resubmitted with, and which checkpoints it does not take for its own."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from packed import write_packed

from orchestrator.config import Config, DataConfig, ModelConfig, TrainConfig, UserError
from orchestrator.data.index import Index
from orchestrator.overrides import config_digest, identity, with_overrides
from orchestrator.run import open_run
from orchestrator.train import model, preflight, resuming
from orchestrator.train.saving import checkpoint, shapes
from orchestrator.train.saving.checkpoint import FileRecord, Manifest
from orchestrator.train.strategies.tensors import WEIGHTS_FILE, write_weights


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_packed(tmp_path / "data", train=40, val=10)


def make_config(index: Index, tmp_path: Path, *, max_epochs: int) -> Config:
    return Config(
        name="run",
        storage_path=str(tmp_path),
        data=DataConfig(index=index.uri, global_batch=7),
        model=ModelConfig(class_path="modules.UserModule"),
        train=TrainConfig(max_epochs=max_epochs),
    )


def commit(
    config: Config, index: Index, *, step: int, position: int, epoch: int, done: str, **changes: Any
) -> str:
    run = f"{config.storage_path}/{config.name}"
    manifest = Manifest(
        step=step, position=position, epoch=epoch, metrics={}, done=done, world_size=1,
        strategy="ddp", precision="32", config_digest=config_digest(config),
        index_digest=index.digest, stats={}, files=(), settings=identity(config),
    )  # fmt: skip
    checkpoint.commit(run, dataclasses.replace(manifest, **changes))
    return run


def test_a_run_whose_last_step_was_short_cannot_be_made_longer(
    index: Index, tmp_path: Path
) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    run = commit(config, index, step=12, position=80, epoch=2, done="max_epochs")
    resuming.check_checkpoints(config, index, run)
    assert preflight.is_finished(config, run)
    with pytest.raises(UserError, match=r"train\.max_epochs=3: the last step .* was shorter"):
        resuming.check_checkpoints(make_config(index, tmp_path, max_epochs=3), index, run)


def test_fewer_epochs_than_are_done_are_refused(index: Index, tmp_path: Path) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    run = commit(config, index, step=8, position=56, epoch=1, done="")
    resuming.check_checkpoints(config, index, run)
    with pytest.raises(UserError, match=r"train\.max_epochs=1 ends before the checkpoint"):
        resuming.check_checkpoints(make_config(index, tmp_path, max_epochs=1), index, run)


@pytest.mark.parametrize("done", ["converged", "diverged"])
def test_a_run_that_stopped_itself_is_finished_whatever_its_epochs(
    index: Index, tmp_path: Path, done: str
) -> None:
    config = make_config(index, tmp_path, max_epochs=9)
    run = commit(config, index, step=6, position=42, epoch=1, done=done)
    assert preflight.is_finished(config, run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.global_batch": 14}, r"data\.global_batch was 7 and is now 14;"),
        ({"seed": 3}, "seed was 0 and is now 3;"),
        (
            {"model.class_path": "modules.Slow", "seed": 3},
            r"model\.class_path was .* \(and 1 more\);",
        ),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_though_no_config_is_left(
    index: Index, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    run = commit(config, index, step=8, position=56, epoch=1, done="")
    with pytest.raises(UserError, match=f"the checkpoint of step 8 .* another config: {said}"):
        resuming.check_checkpoints(with_overrides(config, changes), index, run)


def test_what_is_free_to_change_may_change(index: Index, tmp_path: Path) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    run = commit(config, index, step=8, position=56, epoch=1, done="")
    free = {"scaling.num_workers": 3, "train.max_epochs": 5, "data.max_micro_batch": 1}
    assert resuming.check_checkpoints(with_overrides(config, free), index, run) == "ddp"


def test_a_checkpoint_of_before_a_setting_was_there_had_its_default(
    index: Index, tmp_path: Path
) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    older = {key: value for key, value in identity(config).items() if key != "data.flip"}
    run = commit(config, index, step=8, position=56, epoch=1, done="", settings=older)
    resuming.check_checkpoints(config, index, run)
    with pytest.raises(UserError, match=r"data\.flip was 0\.5 and is now 0\.1"):
        resuming.check_checkpoints(with_overrides(config, {"data.flip": 0.1}), index, run)


def test_a_checkpoint_that_does_not_say_its_settings_has_a_digest_of_them(
    index: Index, tmp_path: Path
) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    other = with_overrides(config, {"seed": 3})
    run = commit(config, index, step=8, position=56, epoch=1, done="", settings={})
    resuming.check_checkpoints(config, index, run)
    with pytest.raises(UserError, match="is of another config: its settings differ;"):
        resuming.check_checkpoints(other, index, run)
    open_run(other)  # which is compared setting by setting
    resuming.check_checkpoints(other, index, run)


def test_a_position_that_the_steps_do_not_lead_to_is_refused(index: Index, tmp_path: Path) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    run = commit(config, index, step=8, position=63, epoch=1, done="")
    with pytest.raises(UserError, match="63 samples were consumed, which are no 8 steps of"):
        resuming.check_checkpoints(config, index, run)


def weights_of(config: Config, tmp_path: Path, run: str, **changes: int) -> None:
    """Store the weights of a model, with other lengths of some of them, as step 8's."""
    weights = dict(model.build(config.model, num_classes=3).state_dict())
    weights |= {name: weights[name][:length] for name, length in changes.items()}
    path = Path(checkpoint.checkpoint_uri(run, 8), WEIGHTS_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(weights, path)


def test_a_checkpoint_of_a_model_whose_code_was_changed_is_refused(
    index: Index, tmp_path: Path
) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    run = commit(config, index, step=8, position=56, epoch=1, done="")
    weights_of(config, tmp_path, run)
    resuming.check_checkpoints(config, index, run)
    weights_of(config, tmp_path, run, **{"net.0.weight": 4, "net.0.bias": 4})
    with pytest.raises(UserError) as refused:
        resuming.check_checkpoints(config, index, run)
    assert (
        "is of another model than modules.UserModule builds now: net.0.bias has shape [4] there "
        "and [8] in the model, net.0.weight has shape [4, 3, 3, 3] there and [8, 3, 3, 3] in the "
        "model; take the change of its code back"
    ) in str(refused.value)
    plain = with_overrides(
        config, {"model.class_path": "orchestrator.train.module.ImageClassifier"}
    )
    with pytest.raises(UserError, match=r"is not in the model.* \(and \d+ more\)"):
        shapes.check_shapes(plain.model, run, checkpoint.read_manifest(run, 8), num_classes=3)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (4).to_bytes(8, "little") + b"[1 ]"])
def test_weights_that_are_damaged_are_left_to_the_start(
    index: Index, tmp_path: Path, content: bytes
) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    files = (FileRecord(WEIGHTS_FILE, 1, ""),)
    run = commit(config, index, step=8, position=56, epoch=1, done="", files=files)
    Path(checkpoint.checkpoint_uri(run, 8), WEIGHTS_FILE).write_bytes(content)
    resuming.check_checkpoints(config, index, run)


class LateModule(model.pl.LightningModule):
    """It makes its layers where it trains."""

    def configure_model(self) -> None:
        self.net = model.pl.LightningModule()


def test_layers_that_are_made_late_are_not_missed(index: Index, tmp_path: Path) -> None:
    config = make_config(index, tmp_path, max_epochs=2)
    late = ModelConfig(class_path=f"{__name__}.LateModule")
    config = dataclasses.replace(config, model=late)
    run = commit(config, index, step=8, position=56, epoch=1, done="")
    weights_of(make_config(index, tmp_path, max_epochs=2), tmp_path, run)
    resuming.check_checkpoints(config, index, run)
