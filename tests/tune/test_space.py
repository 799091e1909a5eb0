"""The sweep's points, without Ray."""

import dataclasses
import math
from typing import Any

import pytest

from orchestrator.config import Config, DataConfig, TuneConfig, UserError
from orchestrator.tune.space import points, trial_config

LR = "model.init_args.lr"


def config(space: dict[str, Any], *, num_samples: int = 4, seed: int = 0, **tune: Any) -> Config:
    section = TuneConfig(space=space, num_samples=num_samples, **tune)
    return Config(name="s", seed=seed, data=DataConfig(index="d"), tune=section)


def test_the_same_seed_gives_the_same_points_and_another_seed_others() -> None:
    space = {LR: {"loguniform": [1e-4, 1e-1]}, "seed": {"randint": [0, 10**6]}}
    assert points(config(space)) == points(config(space))
    assert points(config(space)) != points(config(space, seed=1))


def test_a_new_dimension_or_more_samples_leave_the_other_values_as_they_were() -> None:
    small = points(config({LR: {"uniform": [0, 1]}}, num_samples=3))
    space = {"data.flip": {"uniform": [0, 1]}, LR: {"uniform": [0, 1]}}
    large = points(config(space, num_samples=5))
    assert [p[LR] for p in small] == [p[LR] for p in large[:3]]


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("uniform", -2, 3.5), ("loguniform", 1e-5, 1.0), ("randint", 3, 5)]
)
def test_draws_fill_their_range(kind: str, low: float, high: float) -> None:
    drawn = [p[LR] for p in points(config({LR: {kind: [low, high]}}, num_samples=400))]
    assert low <= min(drawn) <= max(drawn) <= high
    if kind == "randint":
        assert set(drawn) == {3, 4, 5}
        return
    scale = math.log if kind == "loguniform" else float
    shares = [(scale(v) - scale(low)) / (scale(high) - scale(low)) for v in drawn]
    assert sum(share < 0.5 for share in shares) / 400 == pytest.approx(0.5, abs=0.1)
    assert sum(share < 0.1 for share in shares) / 400 == pytest.approx(0.1, abs=0.06)


def test_grids_are_multiplied_and_sampled_around() -> None:
    space = {
        "train.max_epochs": {"grid": [1, 2]},
        "data.global_batch": {"grid": [8, 16, 32]},
        LR: {"uniform": [0, 1]},
    }
    found = points(config(space, num_samples=2))
    cells = [(p["train.max_epochs"], p["data.global_batch"]) for p in found]
    assert len(found) == 12
    assert sorted(set(cells)) == [(1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (2, 32)]
    assert len({p[LR] for p in found}) == 12


def test_equal_points_are_trained_once() -> None:
    found = points(config({LR: {"choice": [0.1, 0.2]}}, num_samples=50))
    assert sorted(p[LR] for p in found) == [0.1, 0.2]


def test_a_trial_is_a_run_of_its_own_below_the_sweep() -> None:
    base = config({LR: {"uniform": [0, 1]}})
    trial = trial_config(base, {LR: 0.25, "train.max_epochs": 7}, trial=3)
    assert trial.name == "s/trials/0003"
    assert trial.tune is None
    assert trial.model.init_args == {"lr": 0.25}
    assert trial.train.max_epochs == 7
    assert base.train.max_epochs == 90


def test_a_section_may_be_chosen_whole() -> None:
    base = config({"train.early_stopping": {"grid": [None, {"patience": 2}]}}, num_samples=1)
    trials = [trial_config(base, p, trial=0) for p in points(base)]
    assert trials[0].train.early_stopping is None
    assert trials[1].train.early_stopping is not None
    assert trials[1].train.early_stopping.patience == 2


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, ["tune.space is empty"]),
        ({"train.max_epoch": {"choice": [1]}}, ["did you mean 'train.max_epochs'"]),
        ({LR: {"uniform": [1, 0]}}, [LR, "low < high", "[1, 0]"]),
        ({LR: {"loguniform": [0, 1]}}, ["above 0", "use uniform"]),
        ({LR: {"loguniform": [0.1]}}, ["two numbers"]),
        ({LR: {"uniform": ["a", "b"]}}, ["two numbers"]),
        ({LR: {"uniform": [0, math.nan]}}, ["two numbers"]),
        ({LR: {"randint": [0.5, 2]}}, ["two integers"]),
        ({LR: {"loguniforn": [1, 2]}}, ["no kind 'loguniforn'", "'loguniform'"]),
        ({LR: {"xyz": [1, 2]}}, ["uniform, loguniform, randint, choice, grid"]),
        ({LR: {"choice": []}}, ["not empty"]),
        ({LR: [1, 2]}, ["must be one of"]),
        ({LR: {"uniform": [0, 1], "choice": [1]}}, ["must be one of"]),
        ({"name": {"choice": ["a"]}}, ["cannot vary 'name'"]),
        ({"tune.num_samples": {"choice": [1]}}, ["cannot vary"]),
        ({"model.init_args": {"choice": [{}]}, LR: {"choice": [1]}}, ["inside it"]),
    ],
)
def test_a_space_that_cannot_work_is_refused(space: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        points(config(space))
    assert [w for w in words if w not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("grace_epochs", 0),
        ("reduction_factor", 1),
        ("max_concurrent_trials", 0),
    ],
)
def test_numbers_that_cannot_work_are_refused(field: str, value: int) -> None:
    base = config({LR: {"uniform": [0, 1]}})
    assert base.tune is not None
    wrong = dataclasses.replace(base, tune=dataclasses.replace(base.tune, **{field: value}))
    with pytest.raises(UserError, match=rf"tune\.{field}={value} must be at least"):
        points(wrong)


def test_a_value_that_does_not_fit_its_field_is_refused() -> None:
    base = config({"data.global_batch": {"uniform": [8, 64]}}, num_samples=1)
    with pytest.raises(UserError, match=r"tune\.space yields .*data\.global_batch"):
        trial_config(base, points(base)[0], trial=0)
