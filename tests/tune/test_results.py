"""The sweep's rows and files, without Ray."""

import json
import math
from pathlib import Path

import pytest
import yaml

from orchestrator import configfile
from orchestrator.config import Config, DataConfig, TuneConfig
from orchestrator.tune.results import (
    Ledger,
    Row,
    SweepResult,
    format_table,
    read_sweep,
    write_outcome,
)
from orchestrator.tune.rungs import Reason, Rungs

LR = "model.init_args.lr"
TUNE = TuneConfig(space={LR: {"uniform": [0, 1]}})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def ledger(tmp_path: Path, said: list[str]) -> Ledger:
    rows = [Row(trial=n, overrides={LR: 0.1 * n}, run=f"{tmp_path}/{n}") for n in range(4)]
    return Ledger(str(tmp_path), TUNE, rows, said.append)


def metrics(epoch: int, loss: float) -> dict[str, object]:
    return {"val_loss": loss, "val_acc": 1 - loss, "epoch": epoch, "step": 10 * epoch, "done": ""}


def rows(*found: tuple[Reason | None, float | None]) -> SweepResult:
    made = [
        Row(trial=n, overrides={}, run="r", reason=reason, best=best)
        for n, (reason, best) in enumerate(found)
    ]
    return SweepResult(sweep="s", metric="val_loss", mode="min", rows=tuple(made), wall_s=1)


def test_a_row_keeps_the_best_value_and_the_whole_curve(ledger: Ledger) -> None:
    for epoch, loss in enumerate([0.5, 0.25, math.nan, 0.75], start=1):
        ledger.report(0, metrics(epoch, loss))
    ledger.report(0, metrics(2, 0.25))  # repeated after a restart
    row = ledger.result.rows[0]
    assert (row.epochs, row.best) == (4, 0.25)
    assert row.metrics == {"val_loss": 0.25, "val_acc": 0.75}
    assert [epoch for epoch, _ in row.curve] == [1, 2, 3, 4]


def test_validations_within_an_epoch_fill_the_same_rungs_in_a_sweep_submitted_again(
    ledger: Ledger,
) -> None:
    live = Rungs(grace_epochs=1, reduction_factor=2, mode="min")
    for step, epochs, loss in ((3, 0, 0.3), (7, 0, 0.2), (10, 1, 0.4), (13, 1, 0.1), (20, 2, 0.5)):
        ledger.report(0, {**metrics(epochs, loss), "step": step})
        live.record(0, epochs=epochs, value=loss)
    assert ledger.result.rows[0].epochs == 2
    again = Rungs(grace_epochs=1, reduction_factor=2, mode="min")
    for epochs, value in ledger.result.rows[0].curve:
        again.record(0, epochs=epochs, value=value)
    for rungs in (live, again):
        # At epoch 1 the best so far was 0.2, and 0.1 came only after it.
        assert rungs.record(1, epochs=1, value=0.19).decision == "keep"
        assert rungs.record(2, epochs=1, value=0.25).decision == "prune"


def test_a_trial_has_exactly_one_reason(ledger: Ledger, said: list[str]) -> None:
    ledger.report(3, metrics(4, 0.53))
    ledger.end(3, "pruned", "place 2 of 2")
    ledger.end(3, "converged")
    assert ledger.result.rows[3].reason == "pruned"
    assert said == ["trial 3 pruned after 4 epochs: best val_loss 0.53 (place 2 of 2)"]


def test_a_sweep_file_gives_its_rows_back_and_is_plain_json(ledger: Ledger, tmp_path: Path) -> None:
    ledger.report(0, metrics(1, math.nan))
    ledger.report(1, metrics(1, 0.5))
    ledger.end(1, "converged", epochs=1)
    text = (tmp_path / "sweep.json").read_text()
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (content["finished"], content["best_trial"]) == (False, 1)
    found = read_sweep(str(tmp_path))
    assert found is not None
    assert found.rows[1] == ledger.result.rows[1]
    assert math.isnan(found.rows[0].curve[0][1])


def test_a_failed_trial_or_one_without_a_finite_value_is_never_best() -> None:
    assert rows(("failed", 0.1), ("converged", None)).best is None
    best = rows(("failed", 0.1), ("pruned", 0.4), ("converged", 0.4), (None, 0.0)).best
    assert best is not None
    assert best.trial == 1


def test_a_failed_trial_keeps_a_sweep_unfinished() -> None:
    assert rows(("pruned", 0.4), ("max_budget", None)).finished
    assert not rows(("pruned", 0.4), ("failed", None)).finished
    assert not rows(("pruned", 0.4), (None, None)).finished


def test_the_best_config_is_one_that_train_takes(ledger: Ledger, tmp_path: Path) -> None:
    config = Config(name="s", data=DataConfig(index="d"), tune=TUNE)
    ledger.report(2, metrics(1, 0.5))
    ledger.end(2, "converged")
    write_outcome(ledger.result, config)
    assert "tune" not in yaml.safe_load((tmp_path / "best.yaml").read_text())
    best = configfile.load(str(tmp_path / "best.yaml"))
    assert (best.name, best.model.init_args) == ("s-best", {"lr": 0.2})


def test_no_best_config_is_written_where_no_trial_has_a_value(
    ledger: Ledger, tmp_path: Path
) -> None:
    ledger.end(0, "failed", "OutOfMemoryError: a | b")
    write_outcome(ledger.result, Config(name="s", tune=TUNE))
    assert not (tmp_path / "best.yaml").exists()
    report = (tmp_path / "report.md").read_text()
    assert "none has a finite val_loss" in report
    assert "a \\| b" in report


def test_the_table_begins_with_the_best_trial(ledger: Ledger) -> None:
    ledger.report(0, metrics(1, 0.5))
    ledger.report(1, metrics(1, 0.25))
    ledger.end(0, "pruned", "place 2 of 2")
    ledger.end(1, "converged")
    lines = format_table(ledger.result).splitlines()
    assert lines[0].split() == ["trial", "ended", "epochs", "best", "settings", "why"]
    assert lines[1].split() == ["1", "converged", "1", "0.25", f"{LR}=0.1"]
    assert lines[2].startswith("0      pruned     1       0.5")
    assert "best: trial 1 with val_loss 0.25" in lines[-1]
