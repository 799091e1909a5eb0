"""The rungs' rule, without Ray."""

import itertools
import math
import random

import pytest

from orchestrator.config import Mode
from orchestrator.tune.rungs import REASONS, Reason, Rungs


def rungs(*, mode: Mode = "min", grace: int = 1, factor: int = 3) -> Rungs:
    return Rungs(grace_epochs=grace, reduction_factor=factor, mode=mode)


def run(table: Rungs, trial: int, values: list[float]) -> int:
    """Report values epoch by epoch; return how many epochs ran until a prune, or all."""
    for epoch, value in enumerate(values, start=1):
        if table.record(trial, epochs=epoch, value=value).decision == "prune":
            table.finish(trial, "pruned")
            return epoch
    return len(values)


def pool_epochs(*, carry: bool) -> int:
    """Epochs of a poor trial that comes first, then twelve good ones that converge at 14."""
    table = rungs(mode="max", factor=4)
    total = run(table, 0, [0.1] * 14)
    for good in range(1, 13):
        total += run(table, good, [0.95] * 14)
        if carry:
            table.finish(good, "converged")
    for epoch in range(15, 65):
        total += 1
        if table.record(0, epochs=epoch, value=0.2).decision == "prune":
            return total
    return total


def test_a_poor_first_trial_meets_the_converged_ones_at_its_next_rung() -> None:
    assert pool_epochs(carry=False) == 232
    assert pool_epochs(carry=True) == 184


def test_the_first_trial_at_a_rung_goes_on_and_a_worse_second_one_does_not() -> None:
    table = rungs()
    assert table.record(0, epochs=1, value=0.5).decision == "keep"
    verdict = table.record(1, epochs=1, value=0.6)
    assert verdict.decision == "prune"
    assert verdict.why == "place 2 of 2 at epoch 1, where 1 may go on"
    assert table.record(2, epochs=1, value=0.4).decision == "keep"


def test_one_in_reduction_factor_goes_on() -> None:
    table = rungs(factor=3)
    kept = [table.record(n, epochs=1, value=float(n)).decision == "keep" for n in range(9)]
    # 1 of up to 5, 2 of 6 to 8, 3 of 9: later ones are worse, so only the first stays.
    assert kept == [True] + [False] * 8
    assert table.record(9, epochs=1, value=1.5).decision == "keep"
    assert table.record(10, epochs=1, value=5.0).decision == "prune"


def test_nothing_is_pruned_between_rungs_or_before_the_first() -> None:
    table = rungs(grace=2)
    run(table, 0, [0.1] * 18)
    table.finish(0, "max_budget")
    decisions = {
        e: table.record(1, epochs=e, value=0.1 if e < 6 else 9.0).decision for e in (1, 2, 3, 5)
    }
    assert set(decisions.values()) == {"keep"}


def test_crossing_curves_are_compared_by_the_best_value_so_far() -> None:
    table = rungs(factor=3)
    assert run(table, 0, [0.9, 0.5, 0.4]) == 3
    # Better at epoch 2 than at epoch 3: what counts is 0.3, not the last value.
    assert run(table, 1, [0.8, 0.3, 0.7]) == 3
    # Behind for long, ahead at the rung.
    assert run(table, 2, [0.8, 0.75, 0.2]) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_that_is_not_finite_is_worst(mode: Mode, bad: float) -> None:
    table = rungs(mode=mode)
    verdict = table.record(0, epochs=1, value=bad)
    assert (verdict.decision, verdict.why) == ("prune", "no finite value by epoch 1")
    assert table.best(0) is None
    # Neither as a diverged trial nor as a complete one does it outdo anybody.
    table.finish(0, "converged")
    assert table.record(1, epochs=1, value=1e9 if mode == "min" else -1e9).decision == "keep"
    assert table.record(1, epochs=3, value=bad).decision == "keep"
    assert table.best(1) == (1e9 if mode == "min" else -1e9)


def test_equal_values_all_go_on() -> None:
    table = rungs()
    assert [table.record(n, epochs=1, value=0.5).decision for n in range(5)] == ["keep"] * 5


def test_mode_max_keeps_the_larger() -> None:
    table = rungs(mode="max")
    assert table.record(0, epochs=1, value=0.5).decision == "keep"
    assert table.record(1, epochs=1, value=0.4).decision == "prune"
    assert table.record(2, epochs=1, value=0.9).decision == "keep"
    assert table.best(2) == 0.9


def test_a_report_that_jumps_fills_every_rung_it_passed() -> None:
    table = rungs(factor=3)
    assert table.record(0, epochs=10, value=0.5).decision == "keep"  # rungs 1, 3 and 9
    for rung, trial in ((1, 1), (3, 2), (9, 3)):
        verdict = table.record(trial, epochs=rung, value=0.6)
        assert verdict.decision == "prune", rung


@pytest.mark.parametrize("reason", REASONS)
def test_only_complete_trials_count_at_rungs_they_never_reached(reason: Reason) -> None:
    table = rungs()
    table.record(1, epochs=1, value=0.2)
    table.record(0, epochs=1, value=0.1)
    table.finish(0, reason)
    pruned = table.record(1, epochs=3, value=0.2).decision == "prune"
    assert pruned is (reason in ("converged", "max_budget"))


def test_the_first_reason_stands() -> None:
    table = rungs()
    table.record(1, epochs=1, value=0.2)
    table.record(0, epochs=1, value=0.1)
    table.finish(0, "pruned")
    table.finish(0, "converged")
    assert table.record(1, epochs=3, value=0.2).decision == "keep"


def test_reports_repeated_after_a_restart_change_nothing() -> None:
    rng = random.Random(0)
    reports = [(t, e, rng.random()) for e in (1, 2, 3, 4, 9) for t in range(8)]
    once, twice = rungs(), rungs()
    verdicts = [once.record(t, epochs=e, value=v) for t, e, v in reports]
    repeated = [
        (twice.record(t, epochs=e, value=v), twice.record(t, epochs=e, value=v))
        for t, e, v in reports
    ]
    assert [first for first, _ in repeated] == verdicts
    assert {again.decision for _, again in repeated} == {"keep"}
    assert {v.decision for v in verdicts} == {"keep", "prune"}


def test_the_best_trial_of_a_pool_is_never_pruned() -> None:
    rng = random.Random(1)
    for _ in range(50):
        table, best = rungs(factor=rng.choice([2, 3, 4])), 7
        for epoch, trial in itertools.product(range(1, 30), rng.sample(range(12), 12)):
            value = 0.0 if trial == best else rng.uniform(0.1, 1.0)
            verdict = table.record(trial, epochs=epoch, value=value)
            assert trial != best or verdict.decision == "keep"
