"""ZeRO 1, 2 and 3 in bare gloo processes: what they hold, what they compute, and where they resume.

The processes and the model are those of `jobs/bench_zero.py`; only Ray is left out.
"""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "jobs"))

from bench_zero import KINDS, Model, Outcome, Trial, expected, main, run_workers, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = ("ddp", *ZERO)
# Smaller than a layer, so that gradients travel in many pieces and large layers on their own.
BUCKET = 100_000
# Bytes that batches, activations and the norm of gradients may take beside the states.
ACTIVATIONS = 1_000_000
LARGEST_MOVE = 0.1 * 0.05 * (1 + 1.9 + 2.71 + 3.439) + 0.01
HELD = {
    (strategy, precision): Trial(strategy=strategy, precision=precision, count=True)
    for precision in ("32", "bf16")
    for strategy in STRATEGIES
}
# Plain SGD shows a wrongly scaled gradient, which Adam would hide; this norm clips every step.
CLIPPED = {
    (strategy, precision): Trial(
        strategy=strategy, precision=precision, optimizer="sgd", clip=0.05, bucket=BUCKET
    )
    for strategy, precision in [
        *((s, "32") for s in STRATEGIES),
        ("ddp", "bf16"),
        ("zero2", "bf16"),
    ]
}
# What is saved and gone on from: every stage, in bf16 too, offloaded, and with a frozen layer.
SAVED = {
    "zero1": Trial(strategy="zero1", optimizer="sgd"),
    "zero2": Trial(strategy="zero2"),
    "zero3": Trial(strategy="zero3"),
    "zero2 bf16": Trial(strategy="zero2", precision="bf16"),
    "zero3 bf16": Trial(strategy="zero3", precision="bf16"),
    "zero1 offloaded": Trial(strategy="zero1", offload=True),
    "zero3 offloaded": Trial(strategy="zero3", offload=True),
    "zero2 frozen": Trial(strategy="zero2", frozen=True),
    "zero3 frozen": Trial(strategy="zero3", frozen=True),
}
OFFLOADED = {
    strategy: Trial(strategy=strategy, precision="bf16", offload=True, count=True)
    for strategy in ZERO
}
Outcomes = dict[Trial, list[Outcome]]


def halves(name: str, folder: Path) -> tuple[Trial, Trial, Trial]:
    """Return an undisturbed run, its first half, and its second half from what that saved."""
    at = folder / name
    at.mkdir(exist_ok=True)
    whole = dataclasses.replace(SAVED[name], bucket=BUCKET)
    first = dataclasses.replace(whole, steps=2, save=str(at))
    return whole, first, dataclasses.replace(whole, first=2, load=str(at))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    offloaded = Trial(strategy="zero2", optimizer="sgd", clip=0.05, bucket=BUCKET, offload=True)
    trials = [*HELD.values(), *CLIPPED.values(), *OFFLOADED.values(), offloaded]
    for name in SAVED:
        trials += halves(name, folder)
    by_worker = run_workers(train, 2, trials)
    return {trial: [each[i] for each in by_worker] for i, trial in enumerate(trials)}


def step_losses(outcomes: list[Outcome]) -> np.ndarray:
    """Return the mean loss over each step's samples."""
    losses = np.mean([outcome.losses for outcome in outcomes], axis=0)
    return losses.reshape(-1, Trial(strategy="ddp").accumulation).mean(axis=1)


def distance(ours: Outcome, theirs: Outcome) -> float:
    """Return the largest difference of two runs' weights."""
    pairs = [(ours.weights[name], value) for name, value in theirs.weights.items()]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize("key", HELD)
def test_workers_hold_what_the_formula_says(outcomes: Outcomes, key: tuple[str, str]) -> None:
    trial = HELD[key]
    formula = expected(trial, 2)
    for outcome in outcomes[trial]:
        held = outcome.held
        assert sum(held[kind] for kind in KINDS) == pytest.approx(formula.states, rel=0.1)
        assert held["parameters"] == pytest.approx(formula.parameters, rel=0.02)
        assert held["optimizer"] == pytest.approx(formula.optimizer, rel=0.02)
        # ZeRO 2 keeps the gradient of the layer that the workers' boundary cuts whole.
        cut = 512 * 512 * (4 if key[1] == "32" else 2) if key[0] == "zero2" else 0
        assert held["gradients"] <= formula.gradients * 1.02 + cut
        assert held["gradients"] >= formula.gradients * 0.98
        assert held["work"] <= formula.work + ACTIVATIONS


@pytest.mark.parametrize("strategy", ZERO)
def test_the_loss_curve_is_that_of_ddp(outcomes: Outcomes, strategy: str) -> None:
    ours, theirs = outcomes[HELD[strategy, "32"]], outcomes[HELD["ddp", "32"]]
    # The same fp32 numbers added in another order.
    assert step_losses(ours) == pytest.approx(step_losses(theirs), rel=1e-5)
    ours, theirs = outcomes[HELD[strategy, "bf16"]], outcomes[HELD["ddp", "bf16"]]
    # DeepSpeed rounds the weights to 8 bits, where autocast rounds them on the fly: as often.
    assert step_losses(ours) == pytest.approx(step_losses(theirs), rel=1e-2)


@pytest.mark.parametrize("strategy", ZERO)
def test_clipped_updates_are_those_of_ddp(outcomes: Outcomes, strategy: str) -> None:
    ours, theirs = outcomes[CLIPPED[strategy, "32"]], outcomes[CLIPPED["ddp", "32"]]
    # Without clipping four steps of SGD go far beyond lr * norm * (1 + 1.9 + 2.7 + 3.4).
    assert 0.01 < theirs[0].moved ** 0.5 < LARGEST_MOVE
    assert sum(each.moved for each in ours) == pytest.approx(theirs[0].moved, rel=1e-3)
    start = dict(Model(512, "sgd").named_parameters())
    moved = max(
        float(np.abs(theirs[0].weights[name] - p.detach().numpy()).max())
        for name, p in start.items()
    )
    assert distance(ours[0], theirs[0]) < 1e-3 * moved


def test_clipping_in_bf16_leaves_what_it_leaves_under_ddp(outcomes: Outcomes) -> None:
    ours, theirs = outcomes[CLIPPED["zero2", "bf16"]], outcomes[CLIPPED["ddp", "bf16"]]
    assert step_losses(ours) == pytest.approx(step_losses(theirs), rel=1e-2)
    assert theirs[0].moved ** 0.5 < LARGEST_MOVE
    assert sum(each.moved for each in ours) == pytest.approx(theirs[0].moved, rel=0.05)


def test_an_offloaded_optimizer_computes_the_same(outcomes: Outcomes) -> None:
    offloaded = next(trial for trial in outcomes if trial.offload and trial.clip)
    kept = CLIPPED["zero2", "32"]
    assert distance(outcomes[offloaded][0], outcomes[kept][0]) < 1e-6


@pytest.mark.parametrize("strategy", ZERO)
def test_what_is_offloaded_is_what_the_formula_says(outcomes: Outcomes, strategy: str) -> None:
    formula = expected(OFFLOADED[strategy], 2)
    for outcome in outcomes[OFFLOADED[strategy]]:
        held = outcome.held
        assert held["host"] == pytest.approx(formula.host, rel=0.05)
        assert held["optimizer"] == 0
        assert sum(held.values()) - held["host"] <= formula.total + ACTIVATIONS


@pytest.mark.parametrize("name", SAVED)
def test_a_resume_on_as_many_workers_is_bit_equal(
    outcomes: Outcomes, folder: Path, name: str
) -> None:
    whole, _, rest = halves(name, folder)
    assert distance(outcomes[rest][0], outcomes[whole][0]) == 0
    assert outcomes[rest][0].losses == outcomes[whole][0].losses[4:]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_resume_on_other_numbers_of_workers_goes_on(
    outcomes: Outcomes, folder: Path, num_workers: int
) -> None:
    rests = [halves(name, folder)[2] for name in SAVED]
    found = run_workers(train, num_workers, rests)
    for i, name in enumerate(SAVED):
        whole, ours = halves(name, folder)[0], [each[i] for each in found]
        assert ours[0].decays == outcomes[whole][0].decays
        exact = whole.precision == "32"
        losses = step_losses(outcomes[whole])[2:]
        assert step_losses(ours) == pytest.approx(losses, rel=1e-5 if exact else 1e-2)
        # In bf16 a sum of gradients in another order rounds to another of 8 bits.
        assert distance(ours[0], outcomes[whole][0]) < (1e-5 if exact else 1e-2)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--width", "64", "--precision", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" parameters, AdamW, 2 workers")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert [row[:2] for row in rows] == [["32", strategy] for strategy in STRATEGIES]
    # (measured / formula - 1), in per cent.
    assert all(re.fullmatch(r"[\d.]+ MB \([+-]\d\.\d%\)", row[6]) for row in rows)
