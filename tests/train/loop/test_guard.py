"""A loss or an update that is no number ends the run at its step, before anything commits it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import Ended, Start, train
from packed import write_packed

from orchestrator.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig
from orchestrator.run import read_events
from orchestrator.train.saving import checkpoint
from orchestrator.train.strategies.tensors import read_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SAMPLE = "train-0030"
# (what is wrong at one sample, strategy, what training_step returns)
CASES = [
    ("nan", "ddp", "tensor"),
    ("inf", "zero2", "tensor"),
    ("nan", "ddp", "manual"),
    ("gradient", "ddp", "dict"),
    ("gradient", "zero1", "tensor"),
    ("gradient", "zero3", "tensor"),
]
Case = tuple[str, str, str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[str, list[Ended]]]:
    folder = tmp_path_factory.mktemp("runs")
    uri = write_packed(folder / "data", train=40, val=7).uri
    runs = {case: str(folder / "-".join(case)) for case in CASES}
    starts = [Start(run=run, config=make_config(uri, case)) for case, run in runs.items()]
    seen = train(2, *starts)
    return {case: (run, each) for (case, run), each in zip(runs.items(), seen, strict=True)}


def make_config(uri: str, case: Case) -> Config:
    wrong, strategy, returns = case
    micro = 8 if returns == "manual" else 2
    return Config(
        name="run",
        data=DataConfig(
            index=uri, global_batch=8, max_micro_batch=micro, image_size=8, window_chunks=3
        ),
        model=ModelConfig(
            class_path="numeric_modules.NotFinite",
            init_args={"sample": SAMPLE, "wrong": wrong, "returns": returns},
        ),
        train=TrainConfig(
            max_epochs=3,
            strategy=strategy,  # type: ignore[arg-type]
            precision="32",
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=1, keep=9),
        ),
    )


def event_of(run: str) -> dict[str, Any]:
    (event,) = (event for event in read_events(run) if event["event"] == "not_finite")
    return event


@pytest.mark.parametrize("case", CASES)
def test_the_step_and_its_samples_are_named(
    ended: dict[Case, tuple[str, list[Ended]]], case: Case
) -> None:
    run, workers = ended[case]
    event, errors = event_of(run), {each.error for each in workers}
    assert errors == {event["problem"]}  # all workers end, and alike
    # Its step is the one whose batches held the sample, for the first time.
    batches = [each.noted["ids"] for each in workers]
    each_step = len(batches[0]) // event["step"]
    last = [ids for mine in batches for ids in mine[-each_step:]]
    assert len(batches[0]) == len(batches[1]) == each_step * event["step"]
    assert sorted(event["step_ids"]) == sorted(i for ids in last for i in ids)
    assert SAMPLE in event["step_ids"]
    if case[0] == "gradient":
        assert event["problem"].startswith(f"update of step {event['step']} is not finite")
    else:
        assert event["ids"] == next(ids for ids in last if SAMPLE in ids)
        assert event["problem"].startswith(f"loss is {case[0]} at step {event['step']}, of samples")
        assert SAMPLE in event["problem"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_committed_is_finite_and_comes_from_just_before(
    ended: dict[Case, tuple[str, list[Ended]]], case: Case
) -> None:
    run, _ = ended[case]
    manifests = checkpoint.list_manifests(run)
    assert manifests[-1].step == event_of(run)["step"] - 1
    weights = read_weights(Path(checkpoint.checkpoint_uri(run, manifests[-1].step)))
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_a_run_that_goes_on_meets_it_again_and_says_the_same(
    ended: dict[Case, tuple[str, list[Ended]]], tmp_path: Path
) -> None:
    run, workers = ended[CASES[0]]
    uri = str(Path(run).parent / "data")
    config = dataclasses.replace(make_config(uri, CASES[0]), name="again")
    again = train(1, Start(run=run, config=config))[0]
    step = f"loss is nan at step {event_of_last(run)['step']}"
    assert again[0].error.startswith(step)
    assert workers[0].error.startswith(step)


def event_of_last(run: str) -> dict[str, Any]:
    return [event for event in read_events(run) if event["event"] == "not_finite"][-1]


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_what_nobody_writes_is_no_alarm(tmp_path: Path, precision: str) -> None:
    uri = write_packed(tmp_path / "data", train=40, val=7).uri
    config = make_config(uri, ("nan", "zero3", "tensor"))
    model = ModelConfig(class_path="numeric_modules.Unset", init_args={"lr": 0.01})
    once = dataclasses.replace(config.train, max_epochs=1, precision=precision)
    config = dataclasses.replace(config, model=model, train=once)
    (workers,) = train(2, Start(run=str(tmp_path / "run"), config=config))
    assert {each.error for each in workers} == {""}
    # Their shards are written as they stand.
    last = checkpoint.list_manifests(str(tmp_path / "run"))[-1]
    folder = Path(checkpoint.checkpoint_uri(str(tmp_path / "run"), last.step))
    masters = [
        group["master"]
        for path in folder.glob("zero-rank-*.pt")
        for group in torch.load(path)["groups"]
    ]
    assert len(masters) == 2
    assert all(bool(torch.isfinite(master).all()) for master in masters)
