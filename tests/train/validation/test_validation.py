"""When a run validates, and that neither a kill, a resume nor another world size changes it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import bare
import pyarrow.parquet as pq
import pytest
from bare import Start
from hypothesis import given
from hypothesis import strategies as st
from packed import write_packed

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    TrainConfig,
    ValidateConfig,
)
from orchestrator.data.plan import Batching
from orchestrator.run import RESULT_FILE
from orchestrator.train.outcome import close_run
from orchestrator.train.place import Place
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation.timetable import Timetable


def timetable(
    *, samples: int, epochs: int, global_batch: int, every: int | None, workers: int = 1
) -> Timetable:
    batching = Batching.for_training(
        total=samples * epochs, global_batch=global_batch, num_workers=workers, max_micro_batch=4
    )
    return Timetable(Place(batching, samples), every)


def test_it_is_due_at_the_first_step_beyond_a_multiple_and_at_each_epochs_end() -> None:
    table = timetable(samples=75, epochs=2, global_batch=13, every=30)
    # Steps end at samples 13, 26, 39, ..., 143 and 150.
    assert [s for s in range(13) if table.is_due(s)] == [3, 5, 6, 7, 10, 12]
    assert [s for s in range(13) if dataclasses.replace(table, every_samples=None).is_due(s)] == [
        6, 12,
    ]  # fmt: skip


def test_counting_costs_nothing_at_ten_billion_samples() -> None:
    table = timetable(samples=10**10, epochs=90, global_batch=256, every=1_000_000)
    # 10^10 is a multiple of 10^6, so that every epoch's end is one of them.
    assert table.count_after(0) == 900_000


@given(
    samples=st.integers(1, 60),
    epochs=st.integers(1, 4),
    global_batch=st.integers(1, 60),
    every=st.none() | st.integers(1, 150),
    workers=st.integers(1, 5),
)
def test_what_is_due_is_counted_and_depends_on_no_worker(
    samples: int, epochs: int, global_batch: int, every: int | None, workers: int
) -> None:
    global_batch = min(global_batch, samples)
    table = timetable(samples=samples, epochs=epochs, global_batch=global_batch, every=every)
    elsewhere = timetable(
        samples=samples, epochs=epochs, global_batch=global_batch, every=every, workers=workers
    )
    steps = range(table.place.batching.num_steps + 1)
    due = [step for step in steps if table.is_due(step)]
    assert due == [step for step in steps if elsewhere.is_due(step)]
    assert due[-1] == steps[-1]
    for step in steps:
        assert table.count_after(step) == sum(other > step for other in due)
    total = samples * epochs
    multiples = {
        *range(samples, total + 1, samples),
        *(range(every, total + 1, every) if every else ()),
    }
    assert due == sorted(
        {next(s for s in steps if table.place.position(s) >= m) for m in multiples}
    )


def make_start(folder: Path, name: str, **changes: Any) -> Start:
    index = write_packed(folder / "data", train=40, val=9)
    stopping = EarlyStoppingConfig(patience=3)
    config = Config(
        name=name,
        storage_path=str(folder),
        data=DataConfig(
            index=index.uri, global_batch=6, max_micro_batch=2, eval_batch=2, image_size=8
        ),
        model=ModelConfig(class_path="modules.Validated", init_args={"num_classes": 3}),
        train=TrainConfig(
            max_epochs=3,
            strategy="ddp",
            precision="32",
            early_stopping=changes.pop("early_stopping", stopping),
            validate=ValidateConfig(every_samples=15),
            checkpoint=CheckpointConfig(every_steps=1, every_seconds=None),
        ),
    )
    (folder / name).mkdir()
    return Start(run=str(folder / name), config=config, **changes)


DUE = [3, 5, 7, 8, 10, 13, 14, 15, 18, 20]


def validated(run: str) -> list[tuple[int, float]]:
    rows = pq.read_table(f"{run}/metrics.parquet").to_pylist()
    return [(row["step"], row["value"]) for row in rows if row["name"] == "val_loss"]


def assert_like(start: Start, whole: Start) -> None:
    """Check that a run validated at the same steps, with the same values and decision."""
    mine, theirs = validated(start.run), validated(whole.run)
    assert [step for step, _ in mine] == [step for step, _ in theirs]
    assert [value for _, value in mine] == pytest.approx([value for _, value in theirs])
    ended, expected = (checkpoint.list_manifests(s.run)[-1] for s in (start, whole))
    assert (ended.step, ended.done) == (expected.step, expected.done)
    assert ended.stopping == pytest.approx(expected.stopping)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Start:
    start = make_start(tmp_path_factory.mktemp("undisturbed"), "whole")
    bare.train(1, start)
    return start


def test_each_validation_is_committed_with_its_metrics(undisturbed: Start) -> None:
    # Its loss is 1 / (1 + step) until step 10, and 1 from there on.
    assert [step for step, _ in validated(undisturbed.run)] == DUE[:8]
    last = checkpoint.list_manifests(undisturbed.run)[-1]
    assert (last.step, last.done, last.epoch) == (15, "converged", 2)
    assert last.metrics == {"val_loss": 1.0}
    assert last.stopping["best_step"] == 10
    assert last.stopping["waited"] == 3
    best = checkpoint.best_of(
        checkpoint.list_manifests(undisturbed.run), monitor="val_loss", mode="min"
    )
    assert best is not None
    assert best.step == 10


@pytest.mark.parametrize("stop_after", [4, 7])
def test_killed_in_front_of_a_validation_and_resumed_with_two_workers(
    tmp_path: Path, undisturbed: Start, stop_after: int
) -> None:
    # Step 7 is one of those that a validation follows: the kill comes before it.
    start = make_start(tmp_path, "killed")
    bare.train(1, dataclasses.replace(start, stop_after=stop_after))
    assert [step for step, _ in validated(start.run)][-1] < 7
    bare.train(2, start)
    assert_like(start, undisturbed)
    ended = checkpoint.list_manifests(start.run)[-1]
    assert ended.world_size == 2


@pytest.mark.parametrize(("module", "step"), [("PausedAtSeven", 7), ("KilledAtSeven", 6)])
def test_a_validation_that_was_not_committed_is_done_by_the_resume(
    tmp_path: Path, undisturbed: Start, module: str, step: int
) -> None:
    start = make_start(tmp_path, "cut")
    model = dataclasses.replace(start.config.model, class_path=f"modules.{module}")
    cut = dataclasses.replace(start.config, model=model)
    bare.train(1, dataclasses.replace(start, config=cut, stop_after=99))
    last = checkpoint.list_manifests(start.run)[-1]
    assert (last.step, last.metrics) == (step, {})
    bare.train(2, start)
    assert_like(start, undisturbed)


def test_a_run_that_diverges_says_so_in_its_result(tmp_path: Path) -> None:
    rule = EarlyStoppingConfig(divergence_threshold=0.9)
    start = make_start(tmp_path, "diverged", early_stopping=rule)
    bare.train(1, start)
    result = close_run(start.run, start.config)
    # The loss is 1 from step 13 on.
    assert (result["stop_reason"], result["steps"], result["best"]["step"]) == ("diverged", 13, 10)
    assert result["early_stopping"]["reason"] == "val_loss was 1 at step 13, worse than 0.9"
    assert json.loads((Path(start.run) / RESULT_FILE).read_text()) == result
