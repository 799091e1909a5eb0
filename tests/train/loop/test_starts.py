"""What a start says of itself: how many there were, and where its seconds went."""

import types
from pathlib import Path
from typing import Any

import pytest
from told import Events

from orchestrator.config import Config
from orchestrator.run import append_event, read_events
from orchestrator.train.loop import reporting
from orchestrator.train.loop.first_step import FirstStep
from orchestrator.train.loop.reporting import Reporter
from orchestrator.train.timing.startup import Startup
from orchestrator.train.timing.timeline import moment_of


def recorder_of(run: Path, **changes: Any) -> Any:
    facts = types.SimpleNamespace(run=str(run), config=Config())
    return types.SimpleNamespace(facts=facts, **changes)


def test_every_start_after_the_first_is_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "Meters", lambda *_, **__: None)
    monkeypatch.setattr(reporting, "_count_steps", lambda *_: None)
    for kind in ("submitted", "training", "submitted", "training", "preempted", "training"):
        append_event(str(tmp_path), kind)
    recorder = recorder_of(tmp_path, metrics=types.SimpleNamespace(follow=lambda _: None))
    reporter = Reporter(recorder, types.SimpleNamespace(), [])  # type: ignore[arg-type]
    reporter.on_fit_start(types.SimpleNamespace(global_rank=0), None)  # type: ignore[arg-type]
    assert reporter._restarts == 2


def test_a_start_after_a_preemption_begins_there(tmp_path: Path) -> None:
    for kind in ("submitted", "training", "preempted", "training"):
        append_event(str(tmp_path), kind)
    began = moment_of(read_events(str(tmp_path))[2])
    startup = Startup(began - 600, [("imports", began - 590), ("workers", began + 3)])
    events = Events()
    committer = types.SimpleNamespace(tell=events)
    recorder = recorder_of(
        tmp_path, committer=committer, clocks=types.SimpleNamespace(saved_at=0.0)
    )
    FirstStep(startup, recorder, types.SimpleNamespace())._tell(workers=2)  # type: ignore[arg-type]
    (event,) = events
    assert (event["restart"], event["total_s"], event["seconds"]) == (True, 3.0, {"workers": 3.0})
