"""A wait for data that does not end is said again and again, with who waits and for how long."""

import time
import types
from typing import Any

from orchestrator.train.loop.starvation import Starvation


def watch(waiting_since: float | None, *, limit_s: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Let worker 1 look for a while; return the events and lines that this brought."""
    events: list[dict[str, Any]] = []
    lines: list[str] = []
    recorder: Any = types.SimpleNamespace(
        step=6,
        committer=types.SimpleNamespace(tell=lambda kind, **of: events.append({kind: of})),
        facts=types.SimpleNamespace(
            board=types.SimpleNamespace(say=types.SimpleNamespace(remote=lines.append))
        ),
    )
    loader: Any = types.SimpleNamespace(waiting_since=waiting_since)
    looking = Starvation(recorder, loader, limit_s=limit_s)
    looking.on_train_start(types.SimpleNamespace(global_rank=1), None)  # type: ignore[arg-type]
    deadline = time.monotonic() + (10 if waiting_since else 0.3)
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    looking.on_exception()
    return events, lines


def test_a_long_wait_is_said_more_than_once() -> None:
    events, lines = watch(time.monotonic() - 100, limit_s=0.1)
    assert len(lines) >= 2
    said = events[0]["no_data"]
    assert (said["rank"], said["step"]) == (1, 7)
    assert 100 <= said["waited_s"] < 120
    assert lines[0].startswith("worker 1 has waited 10")


def test_a_worker_that_does_not_wait_says_nothing() -> None:
    assert watch(None, limit_s=0.02) == ([], [])
