"""The README's first block, as a newcomer runs it (the tests' environment has what it installs)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_reach_97_percent_and_the_command_can_be_pasted_twice(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "digits.py")]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "runs" / "digits"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["split"] == "test"
    assert evaluation["unreadable"] == 0
    assert evaluation["samples"] == sum(entry["samples"] for entry in evaluation["classes"]) > 200
    assert evaluation["accuracy"] >= 0.97
    result = json.loads((run / "result.json").read_text())
    assert result["workers"] == 2
    assert result["stop_reason"] in ("converged", "max_epochs")
    assert str(run / "report.html") in first.stdout
    assert "Traceback" not in first.stdout + first.stderr
    events = (run / "events.jsonl").read_text()

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (run / "events.jsonl").read_text() == events  # nothing was trained again
    assert json.loads((run / "evaluation.json").read_text())["accuracy"] == evaluation["accuracy"]
