"""Real runs whose memory or arithmetic gives out."""

import json
from pathlib import Path
from typing import Any

import pytest
from packed import write_packed

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
)
from orchestrator.run import read_events
from orchestrator.train.errors import Diverged
from orchestrator.train.launch import fit
from orchestrator.train.saving import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]


def make_config(folder: Path, name: str, *, micro: int = 8, **init_args: Any) -> Config:
    data = DataConfig(
        index=write_packed(folder / "data", train=40, val=7).uri,
        global_batch=13,
        max_micro_batch=micro,
        eval_batch=4,
        image_size=8,
        window_chunks=3,
    )
    return Config(
        name=name,
        storage_path=str(folder),
        data=data,
        model=ModelConfig(class_path=f"numeric_modules.{name}", init_args=init_args),
        train=TrainConfig(
            max_epochs=1,
            precision="32",
            max_failures=0,
            checkpoint=CheckpointConfig(every_steps=2),
        ),
        scaling=ScalingConfig(num_workers=2),
    )


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tmp_path: Path) -> None:
    # No failure is allowed: running out of memory is none.
    result = fit(make_config(tmp_path, "Hungry", most=3, most_eval=4, at_step=2))
    assert result.stop_reason == "max_epochs"
    assert result.result["samples_seen"] == 40
    assert result.result["restarts"] == 1
    assert result.result["micro_batch"] == {
        "asked": 7, "used": 3, "eval_asked": 4, "eval_used": 4,
    }  # fmt: skip
    events = read_events(result.run)
    (event,) = (event for event in events if event["event"] == "out_of_memory")
    assert (event["setting"], event["from"], event["to"]) == ("data.max_micro_batch", 7, 3)
    assert event["step"] == 3
    assert "can't allocate memory" in event["error"]
    assert [e["step"] for e in events if e["event"] == "training"] == [0, 2]
    assert not [e for e in events if e["event"] == "failure"]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    said = r"loss is nan at step 3, of .*train-0030.*; lower .* checkpoint is that of step 2\.$"
    with pytest.raises(Diverged, match=said) as caught:
        fit(make_config(tmp_path, "NotFinite", micro=1, sample="train-0030", wrong="nan"))
    run = tmp_path / "NotFinite"
    result = json.loads((run / "result.json").read_text())
    assert (result["stop_reason"], result["steps"]) == ("diverged", 2)
    assert result["problem"] == str(caught.value)
    assert [m.step for m in checkpoint.list_manifests(str(run))] == [2]
    # It would only meet it again: there was no second start.
    assert len([e for e in read_events(str(run)) if e["event"] == "training"]) == 1
