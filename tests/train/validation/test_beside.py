"""Validation beside training: a real run with kills, and its parts without one."""

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bare
import pytest
import ray
from bare import Start
from beside_runs import make_config, validated
from saves import make_manifest

from orchestrator.config import (
    BesideConfig,
    Config,
    ModelConfig,
    ValidateConfig,
)
from orchestrator.run import RESULT_FILE, read_events
from orchestrator.train.launch import RunResult, fit
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation import replica
from orchestrator.train.validation.beside import Outcome, Questions, ValidationProcess


@pytest.fixture(scope="module")
def three_cpus() -> Iterator[None]:
    """Start a cluster that holds two workers and a validation beside them."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def stopped(three_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunResult]:
    """A run whose validating process is killed once, and one of whose workers is, too."""
    folder = tmp_path_factory.mktemp("beside")
    markers = folder / "markers"
    markers.mkdir()
    config = make_config(
        folder, "run", "KilledBeside", num_classes=3, markers=str(markers), step_s=0.15
    )
    result = fit(config)
    assert sorted(os.listdir(markers)) == ["trained", "validated"]
    return config, result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_cost_no_validation_and_no_step(stopped: tuple[Config, RunResult]) -> None:
    _, result = stopped
    found = validated(result.run)
    # The module logs a hundredth of its step: each value is at the step of its checkpoint.
    assert [value for _, value in found] == pytest.approx([step / 100 for step, _ in found])
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    assert result.stop_reason == "converged"
    assert result.result["restarts"] == 1
    stopping = result.result["early_stopping"]
    assert (stopping["best_step"], stopping["waited"]) == (5, 2)
    assert stopping["validations"] == len(found)
    assert result.best == {"val_loss": pytest.approx(0.05), "step": 5, "epoch": 0}
    # The verdict that stopped the run was of an earlier step than the one it reached.
    event = next(e for e in read_events(result.run) if e["event"] == "stopping")
    assert event["step"] == found[2][0] <= event["at_step"] <= result.result["steps"]
    # The last step's weights are validated too, after training.
    assert found[-1][0] == result.result["steps"]
    kept = checkpoint.list_manifests(result.run)
    assert [m.step for m in kept] == [5, result.result["steps"]]
    assert kept[-1].pending == ()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_driver_that_was_killed_while_it_waited_trains_nothing_again(
    stopped: tuple[Config, RunResult],
) -> None:
    config, result = stopped
    last = checkpoint.list_manifests(result.run)[-1]
    checkpoint.amend(result.run, last.step, pending=(last.step,), metrics={})
    (Path(result.run) / RESULT_FILE).unlink()
    before = validated(result.run)
    starts = [e["event"] for e in read_events(result.run)].count("training")
    again = fit(config)
    assert again.result["final"] == pytest.approx(result.result["final"])
    assert again.result["early_stopping"]["best_step"] == 5
    assert [e["event"] for e in read_events(result.run)].count("training") == starts
    # The value of the last step was asked for again, and is not noted twice.
    assert validated(again.run) == before
    assert checkpoint.list_manifests(result.run)[-1].pending == ()


def test_it_finds_what_validation_in_line_finds(tmp_path: Path) -> None:
    config = make_config(tmp_path, "inline", "UserModule", num_classes=3)
    train = dataclasses.replace(config.train, max_epochs=1, validate=ValidateConfig())
    inline = dataclasses.replace(config, train=train)
    run = tmp_path / "inline"
    run.mkdir()
    bare.train(2, Start(run=str(run), config=inline))
    manifest = checkpoint.list_manifests(str(run))[-1]
    metrics, bad = replica.validate(str(run), config, BesideConfig(cpus=2), manifest)
    assert metrics == pytest.approx(manifest.metrics, rel=1e-5)
    assert set(metrics) == {"val_loss"}
    assert bad == []


class Board:
    """Stands for the handle of the board's actor."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @property
    def say(self) -> Any:
        return SimpleNamespace(remote=self.said.append)


def trained_in_line(folder: Path) -> tuple[Config, str, checkpoint.Manifest]:
    """Return a run whose one checkpoint still waits for a validation, and what that will find."""
    config = make_config(folder, "run", "UserModule", num_classes=3)
    model = ModelConfig(class_path="numeric_modules.Hungry", init_args={"most": 2, "most_eval": 2})
    train = dataclasses.replace(config.train, max_epochs=1, validate=ValidateConfig())
    config = dataclasses.replace(config, train=train, model=model)
    run = folder / "run"
    run.mkdir()
    bare.train(1, Start(run=str(run), config=config))
    (manifest,) = checkpoint.list_manifests(str(run))
    checkpoint.amend(str(run), manifest.step, metrics={})
    return config, str(run), manifest


def test_what_runs_out_of_memory_is_halved_and_remembered(tmp_path: Path) -> None:
    config, run, manifest = trained_in_line(tmp_path)
    eight = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_batch=8))
    board = Board()
    outcome = ValidationProcess(run, eight, BesideConfig(), [], board).validate(manifest.step)
    assert outcome.failed == ""
    assert outcome.metrics == pytest.approx(manifest.metrics, rel=1e-5)
    events = [e for e in read_events(run) if e["event"] == "out_of_memory"]
    assert [(e["from"], e["to"], e["step"]) for e in events] == [
        (8, 4, manifest.step),
        (4, 2, manifest.step),
    ]
    assert "data.eval_batch goes from 8 to 4" in board.said[0]
    # Another process, after this one was lost, begins with what fits.
    again = ValidationProcess(run, eight, BesideConfig(), [], board)
    assert again.validate(manifest.step).metrics == outcome.metrics
    assert len(board.said) == 2


def test_one_sample_that_does_not_fit_is_said_and_costs_training_nothing(tmp_path: Path) -> None:
    config, run, manifest = trained_in_line(tmp_path)
    args = {**config.model.init_args, "most_eval": 0}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_args=args))
    process = ValidationProcess(run, config, BesideConfig(), [], Board())
    assert "can't allocate memory" in process.validate(manifest.step).failed


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_validation_that_hangs_is_done_by_another_process(
    three_cpus: None, tmp_path: Path
) -> None:
    # Here, so that it travels by value: its process does not find this file.
    class HangsOnce(ValidationProcess):
        """Answers, but for one question, which it first hangs at."""

        def _validate(self, step: int) -> Outcome:
            with self._watched():
                if step == 4 and not self._marker.exists():
                    self._marker.touch()
                    time.sleep(600)
            return Outcome(step=step, metrics={"val_loss": step / 10}, pid=os.getpid())

        @property
        def _marker(self) -> Path:
            return Path(self._run) / "marker"

    config = make_config(tmp_path, "run", "UserModule", num_classes=3)
    train = dataclasses.replace(config.train, hang_timeout_s=0.1)
    config = dataclasses.replace(config, train=train)
    process = ray.remote(HangsOnce).options(num_cpus=0, max_restarts=-1, max_task_retries=2)
    questions = Questions(process.remote(str(tmp_path), config, BesideConfig(), [], None))
    assert questions.take() == []
    for step in (2, 4, 6):
        questions.ask(step)
    found: list[Outcome] = []
    while questions.out:
        found += questions.take(timeout_s=1.0)
    assert [(o.step, o.metrics["val_loss"]) for o in found] == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert len({o.pid for o in found}) == 2


def test_a_checkpoint_whose_verdict_is_out_is_not_pruned(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step, changes in ((2, {}), (4, {}), (6, {"pending": (4,)}), (8, {"pending": (4, 8)})):
        checkpoint.commit(run, make_manifest(step, **changes))
    checkpoint.prune(run, keep=1, best=None)
    assert [m.step for m in checkpoint.list_manifests(run)] == [4, 8]
    checkpoint.amend(run, 4, metrics={"val_loss": 0.5})
    assert checkpoint.list_manifests(run)[0].metrics == {"val_loss": 0.5}
