"""What is still out when a run ends: answered, failed, or without a place for ever."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from saves import BAD, make_manifest

from orchestrator.config import BesideConfig, Config, TrainConfig, ValidateConfig
from orchestrator.run import METRICS_FILE, QUARANTINE_FILE, read_events
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.journal import Metrics
from orchestrator.train.validation import beside
from orchestrator.train.validation.beside import Outcome, Process
from orchestrator.train.validation.settle import settle

pytestmark = pytest.mark.timeout(120)


class Board:
    """What the user is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.say = SimpleNamespace(remote=self.lines.append)


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run that is trained: the validations of steps 2, 4 and 6 are out, step 2 is pruned."""
    for step, pending in ((4, (2, 4)), (6, (2, 4, 6))):
        done = "max_epochs" if step == 6 else ""
        manifest = make_manifest(step, pending=pending, done=done, stats={"bad": 0})
        checkpoint.commit(str(tmp_path), manifest)
    (tmp_path / METRICS_FILE).write_bytes(Metrics(None).encode())
    return str(tmp_path)


def make_config(cpus: float) -> Config:
    validate = ValidateConfig(beside=BesideConfig(cpus=cpus))
    return Config(name="run", train=TrainConfig(validate=validate, hang_timeout_s=0.1))


@pytest.mark.slow
def test_what_is_out_is_waited_for_and_its_bad_images_are_quarantined(
    one_cpu: None, run: str
) -> None:
    # Here, so that it travels by value.
    class Answers:
        """Finds one bad image, in each validation again."""

        def validate(self, step: int) -> Outcome:
            return Outcome(step=step, metrics={"val_loss": 1 / step}, bad=(BAD,))

    handle = ray.remote(Answers).options(num_cpus=0).remote()
    settle(run, make_config(1), Process(handle, SimpleNamespace(wait=lambda _: True)), Board())  # type: ignore[arg-type]
    fourth, last = checkpoint.list_manifests(run)
    assert (fourth.metrics, last.metrics) == ({"val_loss": 1 / 4}, {"val_loss": 1 / 6})
    assert (fourth.pending, last.pending) == ((), ())
    assert last.stopping["validations"] == 2
    assert last.stats["bad"] == 1
    assert [row["id"] for row in pq.read_table(f"{run}/{QUARANTINE_FILE}").to_pylist()] == ["x"]
    events = {event["event"]: event for event in read_events(run)}
    assert events["quarantined"]["id"] == "x"
    assert events["validation_failed"]["error"] == "its checkpoint was deleted"


@pytest.mark.slow
def test_a_validation_without_a_place_ends_the_wait_and_may_be_made_up_for(
    one_cpu: None, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "_PLACE_S", 0.1)
    board: Any = Board()
    config = make_config(2)
    began = time.monotonic()
    with beside.process(run, config, board) as process:
        settle(run, config, process, board)
    assert time.monotonic() - began < 60
    last = checkpoint.list_manifests(run)[-1]
    assert (last.done, last.pending, last.metrics) == ("max_epochs", (2, 4, 6), {})
    (event,) = read_events(run)
    assert (event["event"], event["steps"]) == ("validations_given_up", [2, 4, 6])
    assert board.lines[0].startswith("the validation beside training has no place yet")
    assert "no place for the validation of steps 2, 4, 6 for" in board.lines[-1]
    assert "submit the same command again" in board.lines[-1]


def test_a_run_whose_validations_are_all_heard_is_left_alone(run: str) -> None:
    checkpoint.amend(run, 6, pending=())
    before = dataclasses.asdict(checkpoint.list_manifests(run)[-1])
    settle(run, make_config(1), Process(None, SimpleNamespace()), Board())  # type: ignore[arg-type]
    assert dataclasses.asdict(checkpoint.list_manifests(run)[-1]) == before
