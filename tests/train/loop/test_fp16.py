"""fp16 with loss scaling, on CPUs: skipped steps are counted, and end a run that only skips."""

from pathlib import Path

import numpy as np
import pytest
from bare import Ended, Start, train
from numeric_modules import Steep
from packed import write_packed

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    Strategy,
    TrainConfig,
)
from orchestrator.run import read_events
from orchestrator.train.loop.skips import MOST_IN_A_ROW
from orchestrator.train.saving import checkpoint

STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero3")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, list[Ended]]:
    """Return whole runs, ones that are killed after 9 steps and go on, and hopeless ones."""
    uri = write_packed(folder / "data", train=40, val=4).uri
    starts = {}
    for strategy in STRATEGIES:
        config, runs = make_config(uri, strategy), folder / strategy
        hopeless = make_config(uri, strategy, hopeless=True)
        starts |= {
            f"{strategy} whole": Start(run=str(runs / "whole"), config=config),
            f"{strategy} killed": Start(run=str(runs / "again"), config=config, stop_after=9),
            f"{strategy} again": Start(run=str(runs / "again"), config=config),
            f"{strategy} hopeless": Start(run=str(runs / "hopeless"), config=hopeless),
        }
    return dict(zip(starts, train(2, *starts.values()), strict=True))


def make_config(uri: str, strategy: Strategy, *, hopeless: bool = False) -> Config:
    data = DataConfig(
        index=uri, global_batch=2, max_micro_batch=1, image_size=8, window_chunks=3, eval_batch=4
    )
    return Config(
        name="run",
        data=data,
        model=ModelConfig(class_path="numeric_modules.Steep", init_args={"at_any_scale": hopeless}),
        train=TrainConfig(
            max_epochs=3 if hopeless else 1,
            strategy=strategy,
            precision="16",
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=4),
        ),
    )


def skipped_in(run: Path) -> int:
    return int(checkpoint.list_manifests(str(run))[-1].stats["skipped_steps"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skipped_steps_are_counted_and_the_others_learn(
    ended: dict[str, list[Ended]], folder: Path, strategy: Strategy
) -> None:
    whole = ended[f"{strategy} whole"]
    assert [each.error for each in whole] == ["", ""]
    # Some 1e3 * 65536 is 10 halvings above what fp16 holds.
    assert 3 < skipped_in(folder / strategy / "whole") < 15
    assert any(
        not np.array_equal(whole[0].weights[name], start.detach().numpy())
        for name, start in Steep().named_parameters()
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resume_goes_on_with_the_scale_and_the_count(
    ended: dict[str, list[Ended]], folder: Path, strategy: Strategy
) -> None:
    whole, again = ended[f"{strategy} whole"][0], ended[f"{strategy} again"][0]
    assert whole.weights.keys() == again.weights.keys()
    for name, value in whole.weights.items():
        np.testing.assert_array_equal(again.weights[name], value)
    skipped = {run: skipped_in(folder / strategy / run) for run in ("whole", "again")}
    assert skipped["again"] == skipped["whole"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_fits_at_no_scale_ends_the_run(
    ended: dict[str, list[Ended]], folder: Path, strategy: Strategy
) -> None:
    (error,) = {each.error for each in ended[f"{strategy} hopeless"]}
    assert error.startswith(f"updates of the last 40 steps up to step {MOST_IN_A_ROW} were all")
    assert "over samples train-" in error
    events = read_events(str(folder / strategy / "hopeless"))
    (event,) = (event for event in events if event["event"] == "not_finite")
    assert (event["step"], event["problem"], len(event["step_ids"])) == (40, error, 2)
