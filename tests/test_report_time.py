"""What a run's time went to, as its report and the command line say it."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.report import write_report
from orchestrator.run import write_result

RESULT: dict[str, Any] = {
    "stop_reason": "max_epochs",
    "epochs": 3,
    "steps": 90,
    "best": {"val_loss": 0.5, "step": 90, "epoch": 3},
    "images_per_s": 100.0,
    "data_wait_share": 0.31,
    "restarts": 0,
    "quarantined": 0,
    "decisions": {"strategy": "ddp"},
    "time": {"wait": 30.0, "forward_backward": 56.9, "startup": 13.0, "restart": 0.0},
    "unattributed_s": 0.1,
    "allocated_s": 100.0,
    "ettr": 0.569,
    "verdict": "input-bound: 34 % of each step waits for data; pack <smaller> | add CPUs.",
}


def test_a_report_begins_with_the_verdict_and_has_a_table_of_the_time(tmp_path: Path) -> None:
    write_result(str(tmp_path), RESULT)
    write_report(str(tmp_path))
    markdown, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    escaped = "input-bound: 34 % of each step waits for data; pack &lt;smaller&gt;"
    for text in (markdown, html):
        assert text.index(escaped) < text.index("Result")
        assert "Of 100.0 s since the first allocation, committed steps computed for 56.90 %" in text
    assert "| forward and backward | 56.9 | 56.9 % |" in markdown
    assert "| unattributed | 0.1 | 0.1 % |" in markdown


def test_a_run_of_before_has_a_report_without_it(tmp_path: Path) -> None:
    write_result(str(tmp_path), {"stop_reason": "max_epochs", "epochs": 3})
    write_report(str(tmp_path))
    assert "## Time" not in (tmp_path / "report.md").read_text()
    assert cli._time_rows({}) == []


def test_the_closing_table_says_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_table("run", cli._run_rows(RESULT))
    shown = " ".join(capsys.readouterr().out.split())
    assert "forward backward 57%, waiting for data 30%, start-up 13%" in shown
    assert "restart 0%" not in shown
    assert "verdict input-bound: 34 %" in shown
