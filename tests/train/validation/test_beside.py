"""Validation beside training: a real run with kills, and its parts without one."""

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bare
import pyarrow.parquet as pq
import pytest
import ray
from bare import Start
from packed import write_packed
from saves import make_manifest

from orchestrator.config import (
    BesideConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
    ValidateConfig,
)
from orchestrator.run import RESULT_FILE, read_events
from orchestrator.train.launch import RunResult, fit
from orchestrator.train.loop.beside_validator import BesideValidator
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation import replica
from orchestrator.train.validation.beside import Outcome, Questions, ValidationProcess


def make_config(folder: Path, name: str, module: str, **init_args: Any) -> Config:
    index = write_packed(folder / "data", train=40, val=9)
    return Config(
        name=name,
        storage_path=str(folder),
        data=DataConfig(
            index=index.uri, global_batch=6, max_micro_batch=2, eval_batch=2, image_size=8
        ),
        model=ModelConfig(class_path=f"modules.{module}", init_args=init_args),
        train=TrainConfig(
            max_epochs=60,
            strategy="ddp",
            precision="32",
            early_stopping=EarlyStoppingConfig(patience=2),
            validate=ValidateConfig(every_samples=30, beside=BesideConfig(cpus=1)),
            checkpoint=CheckpointConfig(every_steps=2, keep=1),
        ),
        scaling=ScalingConfig(num_workers=2),
    )


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


def validated(run: str) -> list[tuple[int, float]]:
    rows = pq.read_table(f"{run}/metrics.parquet").to_pylist()
    return [(row["step"], row["value"]) for row in rows if row["name"] == "val_loss"]


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
    starts = [e["event"] for e in read_events(result.run)].count("training")
    again = fit(config)
    assert again.result["final"] == pytest.approx(result.result["final"])
    assert again.result["early_stopping"]["best_step"] == 5
    assert [e["event"] for e in read_events(result.run)].count("training") == starts
    assert validated(result.run) == validated(again.run)
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
    questions = Questions(process.remote(str(tmp_path), config, BesideConfig(), []))
    assert questions.take() == []
    for step in (2, 4, 6):
        questions.ask(step)
    found = [questions.take(timeout_s=60)[0] for _ in range(3)]
    assert [(o.step, o.metrics["val_loss"]) for o in found] == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert len({o.pid for o in found}) == 2
    assert questions.out == ()


class Slow(Questions):
    """Answers each question after some looks, in the order asked; nothing improves after step 9."""

    def __init__(self, looks: int) -> None:
        self._looks = looks
        self._left: list[tuple[int, int]] = []

    def ask(self, step: int) -> None:
        self._left.append((step, self._looks))

    def take(self, timeout_s: float | None = 0.0) -> list[Outcome]:
        self._left = [(step, looks - 1) for step, looks in self._left]
        done = [step for step, looks in self._left if looks <= 0]
        self._left = [(step, looks) for step, looks in self._left if looks > 0]
        return [self.answer(step) for step in done]

    def answer(self, step: int) -> Outcome:
        if step == 5:
            return Outcome(step=step, failed="its process was killed too often")
        return Outcome(step=step, metrics={"val_loss": float(abs(step - 9))})


class Unheard(BesideValidator):
    """Reports to nobody: Ray Train is not there."""

    def __init__(self, recorder: Recorder, looks: int = 4) -> None:
        super().__init__(recorder, Slow(looks))

    def report(self, *_: Any, **__: Any) -> None:
        pass


class Prompt(Unheard):
    """Hears a verdict at the step after it has asked."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder, looks=1)


class KilledAtTheEnd(Prompt):
    """Ends in front of the last commit."""

    def on_train_epoch_end(self, *_: Any) -> None:
        if self._recorder.standing.done:
            raise KeyError("killed")
        super().on_train_epoch_end(*_)


def test_verdicts_come_late_and_count_in_the_order_of_their_steps(tmp_path: Path) -> None:
    config = make_config(tmp_path, "late", "UserModule", num_classes=3)
    whole = Start(run=str(tmp_path / "late"), config=config, validator=Unheard)
    Path(whole.run).mkdir()
    # Ends as if it were killed, with the validations of steps 5 and 7 under way.
    bare.train(1, dataclasses.replace(whole, stop_after=8))
    last = checkpoint.list_manifests(whole.run)[-1]
    assert (last.step, last.pending, last.stopping["validations"]) == (7, (5, 7), 0)
    bare.train(2, whole)
    events = read_events(whole.run)
    assert [e["step"] for e in events if e["event"] == "validation_failed"] == [5]
    found = checkpoint.list_manifests(whole.run)
    last = found[-1]
    assert (last.done, last.stopping["waited"]) == ("converged", 2)
    assert last.pending[-1] == last.step
    assert {m.step for m in found} >= set(last.pending)
    # What fell due while two were under way was skipped; the others have their own values.
    skipped = {e["step"] for e in events if e["event"] == "validation_skipped"}
    rows = validated(whole.run)
    assert rows
    assert [step for step, _ in rows] == sorted(step for step, _ in rows)
    assert all(value == abs(step - 9) for step, value in rows)
    assert skipped.isdisjoint({step for step, _ in rows})
    (stop,) = (e for e in events if e["event"] == "stopping")
    assert stop["step"] < stop["at_step"] == last.step


def prompt_start(folder: Path, validator: type[Prompt], *, patience: int) -> Start:
    """Return a start that commits at validations only, and that gets no better after step 7.

    Steps 5, 7, 10, 14, ... are validated, the first in vain.
    """
    config = make_config(folder, "run", "UserModule", num_classes=3)
    train = dataclasses.replace(
        config.train,
        early_stopping=EarlyStoppingConfig(mode="max", patience=patience),
        checkpoint=CheckpointConfig(every_seconds=None),
    )
    config = dataclasses.replace(config, train=train)
    (folder / "run").mkdir()
    return Start(run=str(folder / "run"), config=config, validator=validator)


def test_a_verdict_that_a_checkpoint_holds_counts_once_after_a_kill(tmp_path: Path) -> None:
    start = prompt_start(tmp_path, Prompt, patience=2)
    bare.train(1, dataclasses.replace(start, stop_after=12))
    last = checkpoint.list_manifests(start.run)[-1]
    assert (last.step, last.pending, last.done) == (10, (), "")
    assert (last.stopping["validations"], last.stopping["waited"]) == (2, 1)
    bare.train(1, dataclasses.replace(start, stop_after=2))
    assert checkpoint.list_manifests(start.run)[-1].stopping == last.stopping
    assert [step for step, _ in validated(start.run)] == [7, 10]


def test_a_run_that_is_killed_after_the_verdict_that_stops_it_has_ended(tmp_path: Path) -> None:
    start = prompt_start(tmp_path, KilledAtTheEnd, patience=1)
    bare.train(1, dataclasses.replace(start, stop_after=99))
    last = checkpoint.list_manifests(start.run)[-1]
    assert (last.step, last.done, last.stopping["waited"]) == (10, "converged", 1)


def test_a_checkpoint_whose_verdict_is_out_is_not_pruned(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step, changes in ((2, {}), (4, {}), (6, {"pending": (4,)}), (8, {"pending": (4, 8)})):
        checkpoint.commit(run, make_manifest(step, **changes))
    checkpoint.prune(run, keep=1, best=None)
    assert [m.step for m in checkpoint.list_manifests(run)] == [4, 8]
    checkpoint.amend(run, 4, metrics={"val_loss": 0.5})
    assert checkpoint.list_manifests(run)[0].metrics == {"val_loss": 0.5}
