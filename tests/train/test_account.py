"""What a run says of its time where drivers were killed and the run was submitted again."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
from moments import NOON, event
from saves import make_manifest

from orchestrator.config import BesideConfig, Config, TrainConfig, ValidateConfig
from orchestrator.data.assemble import Costs
from orchestrator.data.plan import Batching
from orchestrator.report import write_report
from orchestrator.run import EVENTS_FILE, open_run, read_events, read_result, write_result
from orchestrator.train import outcome, preflight
from orchestrator.train.account import _placed, account
from orchestrator.train.errors import Diverged
from orchestrator.train.saving import checkpoint
from orchestrator.train.timing import clocks
from orchestrator.train.timing.clocks import Clocks
from orchestrator.train.timing.pace import Pace
from orchestrator.train.timing.timeline import Timeline, to_stats

ALONE: Any = types.SimpleNamespace(world_size=1)
# Submitted, and killed long after the last checkpoint; the next day submitted again.
FIRST = [event("submitted", 0), event("training", 20)]
SECOND = [*FIRST, event("submitted", 2_000), event("training", 2_017)]


class Clock:
    """The time of all clocks."""

    def __init__(self) -> None:
        self.now = NOON

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clocks, "time", made)
    return made


def start(
    clock: Clock, at: float, events: list[dict[str, Any]], totals: dict[str, float]
) -> Clocks:
    """Return the clocks of a start whose first batch comes so many seconds after noon."""
    loader: Any = types.SimpleNamespace(
        batching=Batching(80, 8, 1, accumulation=1), image_size=8, shares_cpus=False,
        waited_s=0.0, prepared_s=0.0, costs=Costs(),
    )  # fmt: skip
    clock.now = NOON + at
    pace = Pace(lambda: 0.0, totals, step=0)
    pace.timeline = Timeline(clock.time)
    made = Clocks("", loader, pace, totals, step=0)
    made._events = events
    made._begin()
    made.timeline.enter("forward_backward")
    return made


def save(clock: Clock, made: Clocks, at: float) -> dict[str, float]:
    clock.now = NOON + at
    return made.totals(ALONE)


def test_a_session_that_was_killed_counts_up_to_its_last_checkpoint(clock: Clock) -> None:
    first = start(clock, 20, FIRST, {})
    save(clock, first, 600)
    saved = save(clock, first, 1_200)
    # Killed at 1,300 s, which nothing tells.
    again = start(clock, 2_017, SECOND, saved)
    last = make_manifest(100, stats=save(clock, again, 2_110))
    found = account(SECOND, last, Config(), now=NOON + 2_117)
    assert found["allocated_s"] == pytest.approx(1_200 + 117)
    assert sum(found["time"].values()) == pytest.approx(found["allocated_s"])
    assert found["ettr"] == pytest.approx((1_180 + 93) / 1_317)
    assert found["unattributed_s"] == 0


def test_a_start_that_saves_before_its_first_batch_carries_on_what_was_allocated(
    clock: Clock,
) -> None:
    saved = save(clock, start(clock, 20, FIRST, {}), 1_200)
    made = start(clock, 2_017, SECOND, saved)
    made._began = False
    assert made.totals(ALONE)["allocated_s"] == saved["allocated_s"] == 1_200


def test_what_was_allocated_does_not_hang_on_the_parts(clock: Clock) -> None:
    made = start(clock, 20, FIRST, {})
    made.timeline._seconds["forward_backward"] -= 30  # as where workers' clocks disagree
    last = make_manifest(100, stats=save(clock, made, 1_200))
    found = account(FIRST, last, Config(), now=NOON + 1_200)
    assert (found["allocated_s"], found["unattributed_s"]) == (1_200, 30)


@pytest.mark.parametrize(("workers", "kept"), [(1, True), (2, False)])
def test_a_ceiling_holds_for_the_world_size_it_was_measured_at(
    clock: Clock, workers: int, kept: bool
) -> None:
    before = {"ceiling_s": 0.5, "slow_rank": 1.0, "slow_factor": 1.5, "workers": float(workers)}
    made = start(clock, 20, FIRST, before)
    found = save(clock, made, 600)
    assert {name in found for name in ("ceiling_s", "slow_rank", "slow_factor")} == {kept}
    assert found["workers"] == 1


def test_the_newest_start_says_what_readers_have(clock: Clock) -> None:
    last = make_manifest(100, stats=save(clock, start(clock, 20, FIRST, {}), 600))
    config = Config(train=TrainConfig(validate=ValidateConfig(beside=BesideConfig(cpus=2))))

    def spare(*events: dict[str, Any]) -> Any:
        begun = [event("submitted", 0, cpus=8.0), event("training", 20), *events]
        return _placed(begun, config, last.world_size)["spare_cpus"]

    assert spare() == 4  # of 8, two workers and validation beside them leave 4
    assert spare(event("decided", 20, spare_cpus=12.0)) == 12  # the cluster has grown


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Return a run whose driver was killed after its last commit."""
    stats = {"train_s": 80.0, "wait_s": 8.0, "bad": 0.0, "saved_at": NOON + 100}
    stats |= to_stats({**clocks.from_stats({}), "startup": 20.0, "forward_backward": 80.0})
    checkpoint.commit(str(tmp_path), make_manifest(10, done="max_epochs", stats=stats))
    lines = [json.dumps(each) + "\n" for each in FIRST]
    (tmp_path / EVENTS_FILE).write_text("".join(lines))
    return str(tmp_path)


def test_a_driver_that_was_killed_after_the_last_commit_has_a_result_of_then(run: str) -> None:
    result = outcome.result_of(run, Config())
    assert (result["wall_s"], result["allocated_s"], result["ettr"]) == (100, 100, 0.8)
    assert read_result(run) == result
    assert read_events(run) == FIRST  # nothing happened now


@pytest.mark.parametrize("stale", [{"steps": 5, "stop_reason": "max_epochs"}, {"steps": 10}])
def test_a_result_of_an_earlier_end_is_written_again(run: str, stale: dict[str, Any]) -> None:
    write_result(run, stale)
    assert outcome.result_of(run, Config())["samples_seen"] == 100
    own = {"steps": 10, "stop_reason": "max_epochs", "kept": True}
    write_result(run, own)
    assert outcome.result_of(run, Config()) == own


def test_a_run_that_failed_has_a_result_and_goes_on(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(storage_path=str(Path(run).parent), name=Path(run).name)
    checkpoint.amend(run, 10, done="")
    with (Path(run) / EVENTS_FILE).open("a") as file:
        file.write(json.dumps(event("failed", 130, error="x")) + "\n")
    monkeypatch.setattr(outcome.time, "time", lambda: NOON + 130)
    outcome.close_failed(run, config, "ArithmeticError: x")
    result = read_result(run)
    assert result is not None
    assert (result["stop_reason"], result["problem"]) == ("failed", "ArithmeticError: x")
    # 30 s after the last checkpoint: what was computed then is lost.
    assert (result["time"]["restart"], result["allocated_s"]) == (30, 130)
    assert result["verdict"]
    assert not preflight.is_trained(config, run)
    write_report(run)
    assert "failed: ArithmeticError: x" in (Path(run) / "report.md").read_text()
    checkpoint.amend(run, 10, done="max_epochs")
    assert outcome.result_of(run, config)["stop_reason"] == "max_epochs"


def test_a_run_that_ends_before_its_first_checkpoint_has_a_result(tmp_path: Path) -> None:
    config = Config(storage_path=str(tmp_path), name="run")
    run = open_run(config)
    outcome.close_failed(run, config, "ArithmeticError: x")
    result = read_result(run)
    assert result is not None
    assert (result["stop_reason"], result["problem"]) == ("failed", "ArithmeticError: x")
    assert (result["steps"], result["final"], result["verdict"]) == (0, {}, None)
    error = outcome.close_diverged(run, config, Diverged("loss is nan at step 7"))
    assert str(error) == "loss is nan at step 7; there is no checkpoint from before it."
    assert (read_result(run) or {})["stop_reason"] == "diverged"
    write_report(run)
    assert "loss is nan at step 7" in (Path(run) / "report.md").read_text()
