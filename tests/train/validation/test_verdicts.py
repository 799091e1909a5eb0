"""Verdicts of validations beside training: heard late, lost by kills, or never. No Ray."""

import dataclasses
from pathlib import Path
from typing import Any

import bare
import pyarrow.parquet as pq
from bare import Start
from beside_runs import make_config, validated
from saves import BAD

from orchestrator.config import (
    CheckpointConfig,
    EarlyStoppingConfig,
    ModelConfig,
)
from orchestrator.run import read_events
from orchestrator.train.loop.beside_validator import BesideValidator
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.recovery.notice import Looks
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation.beside import Outcome, Questions


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
        bad = (BAD,) if step == 10 else ()
        return Outcome(step=step, metrics={"val_loss": float(abs(step - 9))}, bad=bad)


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

    def on_train_start(self, *_: Any) -> None:
        super().on_train_start(*_)
        self._looks = Looks(step=self._recorder.step, every_s=0.0)  # at each step


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


def test_a_schedule_that_would_wait_for_verdicts_is_refused_at_the_start(tmp_path: Path) -> None:
    start = prompt_start(tmp_path, Prompt, patience=1)
    train = dataclasses.replace(start.config.train, early_stopping=EarlyStoppingConfig())
    model = ModelConfig(class_path="numeric_modules.Scheduled", init_args={"schedule": "plateau"})
    config = dataclasses.replace(start.config, train=train, model=model)
    (ended,), *_ = bare.train(1, dataclasses.replace(start, config=config))
    assert "'val_loss' some steps later" in ended.error
    assert "set train.validate.beside to null" in ended.error
    assert checkpoint.list_manifests(start.run) == []


def test_bad_images_of_the_verdict_that_stops_a_run_are_quarantined(tmp_path: Path) -> None:
    start = prompt_start(tmp_path, Prompt, patience=1)
    # The step that hears of it is committed before.
    train = dataclasses.replace(start.config.train, checkpoint=CheckpointConfig(every_steps=1))
    start = dataclasses.replace(start, config=dataclasses.replace(start.config, train=train))
    bare.train(1, start)
    last = checkpoint.list_manifests(start.run)[-1]
    assert (last.step, last.done, last.pending) == (11, "converged", (11,))
    rows = pq.read_table(f"{start.run}/quarantine.parquet").to_pylist()
    assert [row["id"] for row in rows] == [BAD["id"]]


class Never(Unheard):
    """Its validations never end."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder, looks=10**9)


def test_no_step_waits_for_a_validation(tmp_path: Path) -> None:
    start = prompt_start(tmp_path, Never, patience=1)
    train = dataclasses.replace(start.config.train, max_epochs=3)
    start = dataclasses.replace(start, config=dataclasses.replace(start.config, train=train))
    (ended,), *_ = bare.train(1, start)
    assert ended.error == ""
    last = checkpoint.list_manifests(start.run)[-1]
    # The two that are under way, and the last step's, which is asked for after training.
    assert (last.step, last.done, last.pending) == (20, "max_epochs", (5, 7, 20))
    skipped = [e["step"] for e in read_events(start.run) if e["event"] == "validation_skipped"]
    assert skipped == [10, 14, 15]
