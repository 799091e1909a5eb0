"""What ZeRO's workers save is written beside the steps, as all else is."""

from pathlib import Path

import pytest
from bare import Start, train
from packed import write_packed

from orchestrator.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig
from orchestrator.train.saving import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_no_file_of_a_shard_is_written_by_the_training_thread(tmp_path: Path) -> None:
    config = Config(
        name="run",
        data=DataConfig(
            index=write_packed(tmp_path / "data", train=24, val=0).uri,
            global_batch=8,
            max_micro_batch=4,
            image_size=8,
        ),
        model=ModelConfig(class_path="numeric_modules.Writes", init_args={"lr": 0.01}),
        train=TrainConfig(
            max_epochs=2,
            strategy="zero2",
            precision="32",
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=1),
        ),
    )
    (workers,) = train(2, Start(run=str(tmp_path / "run"), config=config))
    assert {each.error for each in workers} == {""}
    for rank, each in enumerate(workers):
        names, threads = zip(*each.noted["files"], strict=True)
        assert f"zero-rank-{rank:05d}.pt" in names
        assert set(threads) == {"background"}
    last = checkpoint.list_manifests(str(tmp_path / "run"))[-1]
    assert {"zero-rank-00000.pt", "zero-rank-00001.pt"} <= {file.name for file in last.files}
