"""A deadlock ends a start; the same failure three times ends the run: on a real Ray cluster."""

from pathlib import Path

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
from orchestrator.train.launch import TrainingFailed, fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]
STUCK_AT = 5


def test_a_standstill_is_noticed_and_the_same_failure_three_times_is_the_end(
    tmp_path: Path,
) -> None:
    index = write_packed(tmp_path / "data", train=75, val=11)
    marker = tmp_path / "marker"
    config = Config(
        name="stumbles",
        storage_path=str(tmp_path),
        data=DataConfig(index=index.uri, global_batch=13, image_size=8),
        model=ModelConfig(
            class_path="modules.Stumbles", init_args={"marker": str(marker), "at_step": STUCK_AT}
        ),
        train=TrainConfig(
            max_epochs=3,
            precision="32",
            checkpoint=CheckpointConfig(every_steps=2),
            hang_timeout_s=6.0,
        ),
        scaling=ScalingConfig(num_workers=1),
    )
    said = (
        rf"same failure three times at step {STUCK_AT + 2}: Peculiar: this sample is odd; mend the "
        r"code, or the data of that step \(trace: .*error.txt\); submit the same command again"
    )
    with pytest.raises(TrainingFailed, match=said):
        fit(config, show=False)
    events = read_events(str(tmp_path / "stumbles"))
    failures = [event for event in events if event["event"] == "failure"]
    assert [(f["cause"], f["step"], f["count"], f["action"]) for f in failures] == [
        ("hang", STUCK_AT, 1, "restart"),
        ("code", STUCK_AT + 2, 2, "restart"),
        ("code", STUCK_AT + 2, 3, "restart"),
        ("code", STUCK_AT + 2, 4, "give up"),
    ]
    assert "all workers have been inside step 6 for" in failures[0]["error"]
    assert "in happen" in (tmp_path / "stumbles/stacks/rank-00000.txt").read_text()
    assert "in training_step" in (tmp_path / "stumbles" / "error.txt").read_text()
    assert not list((tmp_path / "stumbles").glob("lease-*"))
