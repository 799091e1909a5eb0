"""Random numbers that a module draws before its training step are the same after a resume."""

from pathlib import Path

import numpy as np
import pytest
from bare import Start, train
from packed import write_packed

from orchestrator.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_resume_draws_what_an_undisturbed_run_draws(tmp_path: Path) -> None:
    index = write_packed(tmp_path / "data", train=40, val=7)
    config = Config(
        name="run",
        data=DataConfig(index=index.uri, global_batch=8, max_micro_batch=2, image_size=8),
        model=ModelConfig(class_path="modules.Noisy", init_args={"num_classes": 3}),
        train=TrainConfig(
            strategy="ddp",
            precision="32",
            max_epochs=2,
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=2),
        ),
    )
    killed = Start(run=str(tmp_path / "killed"), config=config, stop_after=5)
    resumed = Start(run=str(tmp_path / "killed"), config=config)
    whole = Start(run=str(tmp_path / "whole"), config=config)
    _, again, once = (ended for (ended,) in train(1, killed, resumed, whole))
    assert again.weights.keys() == once.weights.keys() != set()
    for name, weight in once.weights.items():
        np.testing.assert_array_equal(again.weights[name], weight)
