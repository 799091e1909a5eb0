"""What is said of a micro-batch that memory does not hold: when, how large, and what to do."""

import pytest
from bare import Ended, Start, train
from packed import write_packed

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    ValidateConfig,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
# Setting of micro-batches, the most that fit in training and in validation, and the rest.
CASES = {
    "training": {"micro": 8, "most": 3, "most_eval": 9, "at_step": 1},
    "validation": {"micro": 8, "most": 9, "most_eval": 2, "at_step": 0},
    "one sample": {"micro": 1, "most": 0, "most_eval": 9, "at_step": 1},
    "save at an epoch's end": {"micro": 8, "most": 9, "most_eval": 9, "at_save": True},
    "save after a validation": {
        "micro": 8, "most": 9, "most_eval": 9, "at_save": True, "every_samples": 13,
    },
}  # fmt: skip
SAVES = [name for name in CASES if name.startswith("save")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("runs")
    uri = write_packed(folder / "data", train=26, val=5).uri
    starts = []
    for name, case in CASES.items():
        data = DataConfig(
            index=uri,
            global_batch=13,
            max_micro_batch=case["micro"],
            eval_batch=5,
            image_size=8,
            window_chunks=3,
        )
        hungry = {k: value for k, value in case.items() if k not in ("micro", "every_samples")}
        config = Config(
            name=name,
            data=data,
            model=ModelConfig(class_path="numeric_modules.Hungry", init_args=hungry),
            train=TrainConfig(
                max_epochs=1,
                strategy="ddp",
                precision="32",
                early_stopping=None,
                validate=ValidateConfig(every_samples=case.get("every_samples")),
                checkpoint=CheckpointConfig(every_steps=None if name in SAVES else 1),
            ),
        )
        starts.append(Start(run=str(folder / name), config=config))
    return {name: each[0] for name, each in zip(CASES, train(1, *starts), strict=True)}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("training", "out of memory at step 2 with 7 samples at once (data.max_micro_batch): "),
        ("validation", "out of memory at step 3 with 5 samples at once (data.eval_batch): "),
        ("one sample", "data.max_micro_batch: step 2 ran out of memory with one sample at once ("),
    ],
)
def test_the_step_and_the_samples_are_named(ended: dict[str, Ended], name: str, said: str) -> None:
    assert ended[name].error.startswith(said)
    assert "can't allocate memory" in ended[name].error


@pytest.mark.parametrize("name", SAVES)
def test_a_save_that_runs_out_is_not_the_micro_batchs_fault(
    ended: dict[str, Ended], name: str
) -> None:
    assert ended[name].error.startswith("not of a micro-batch: ")
