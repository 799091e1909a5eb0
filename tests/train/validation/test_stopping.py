"""The rule that stops a run: what counts, what stops, and that a resume changes nothing."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import EarlyStopping

from orchestrator.config import EarlyStoppingConfig
from orchestrator.train.validation.stopping import (
    Standing,
    lightning_key,
    standing_of,
    standing_of_lightning,
)

VALUES = st.lists(
    st.floats(min_value=-100, max_value=100, width=32) | st.just(math.nan), min_size=1, max_size=30
)
FRESH = Standing()
RULES = st.builds(
    EarlyStoppingConfig,
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.5, 8.0]),
    divergence_threshold=st.sampled_from([None, -50.0, 50.0]),
)


def judge_all(
    values: list[float], rule: EarlyStoppingConfig, standing: Standing = FRESH, first: int = 0
) -> Standing:
    for number, value in enumerate(values, start=first):
        standing = standing.judge(rule, step=10 * (number + 1), value=value)
    return standing


def test_patience_counts_validations_without_improvement() -> None:
    rule = EarlyStoppingConfig(patience=2)
    assert judge_all([1.0, 0.5, 0.6], rule).done == ""
    stopped = judge_all([1.0, 0.5, 0.6, 0.5], rule)
    assert (stopped.done, stopped.waited, stopped.validations) == ("converged", 2, 4)
    assert (stopped.best, stopped.best_step) == (0.5, 20)
    assert stopped.reason == "2 validations in a row did not beat val_loss 0.5 of step 20"


def test_small_gains_are_no_improvement_yet_the_best_is_the_best() -> None:
    rule = EarlyStoppingConfig(monitor="val_acc", mode="max", patience=2, min_delta=0.1)
    stopped = judge_all([0.5, 0.55, 0.58], rule)
    assert stopped.done == "converged"
    assert (stopped.reference, stopped.reference_step) == (0.5, 10)
    assert (stopped.best, stopped.best_step) == (0.58, 30)
    assert stopped.reason.endswith("val_acc 0.5 of step 10 by more than 0.1")
    assert judge_all([0.5, 0.55, 0.61], rule).waited == 0


@pytest.mark.parametrize(
    ("mode", "threshold", "value", "done"),
    [
        ("min", 5.0, 5.1, "diverged"),
        ("min", 5.0, 5.0, ""),
        ("max", 0.2, 0.1, "diverged"),
        ("max", 0.2, 0.3, ""),
        ("min", None, 1e30, ""),
        ("min", None, math.nan, "diverged"),
        ("max", None, math.inf, "diverged"),
    ],
)
def test_a_run_diverges_beyond_the_threshold_or_where_there_is_no_number(
    mode: str, threshold: float | None, value: float, done: str
) -> None:
    rule = EarlyStoppingConfig(mode=mode, divergence_threshold=threshold)  # type: ignore[arg-type]
    stopped = judge_all([value], rule)
    assert stopped.done == done
    assert stopped.reason == "" if not done else "at step 10" in stopped.reason


def test_values_after_the_decision_change_what_is_best_and_nothing_else() -> None:
    rule = EarlyStoppingConfig(patience=1)
    stopped = judge_all([0.5, 0.6], rule)
    late = judge_all([0.3, math.nan], rule, stopped, first=2)
    assert (late.best, late.best_step, late.validations) == (0.3, 30, 4)
    same = {"best": late.best, "best_step": late.best_step, "validations": 4}
    assert dataclasses.replace(stopped, **same) == late  # type: ignore[arg-type]


@given(VALUES, RULES, st.data())
def test_a_resume_anywhere_comes_to_the_same_decision(
    values: list[float], rule: EarlyStoppingConfig, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(values)))
    before = judge_all(values[:cut], rule)
    resumed = standing_of(json.loads(json.dumps(before.record(rule))), rule)
    assert resumed is not None
    assert judge_all(values[cut:], rule, resumed, first=cut) == judge_all(values, rule)


@given(VALUES, RULES)
def test_it_stops_where_lightning_does(values: list[float], rule: EarlyStoppingConfig) -> None:
    theirs = EarlyStopping(**dataclasses.asdict(rule))
    standing = Standing()
    for number, value in enumerate(values):
        stops, _ = theirs._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))
        standing = standing.judge(rule, step=number + 1, value=value)
        assert bool(standing.done) == stops
        if stops:
            return
        assert standing.waited == theirs.wait_count
    assert lightning_key(rule) == theirs.state_key
    taken_over = standing_of_lightning(theirs.state_dict())
    assert (taken_over.waited, taken_over.reference) == (standing.waited, standing.reference)


def test_what_was_seen_of_another_metric_does_not_count() -> None:
    rule = EarlyStoppingConfig(monitor="val_loss")
    record = judge_all([1.0], rule).record(rule)
    assert standing_of(record, EarlyStoppingConfig(monitor="val_acc", mode="max")) is None
    assert standing_of(record, None) is None
    assert standing_of({}, rule) is None
    assert Standing().record(None) == {}
