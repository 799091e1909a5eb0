"""The report of a run: complete, missing and hostile run folders."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import S3Server

from orchestrator import plots, storage
from orchestrator.config import UserError
from orchestrator.report import draw_pictures, write_report
from orchestrator.run import append_event, write_result
from orchestrator.tables import describe_outcome

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = '<script>alert("x")</script>'

RESULT: dict[str, Any] = {
    "run": "digits",
    "stop_reason": "converged",
    "epochs": 23,
    "steps": 1_127,
    "samples_seen": 36_064,
    "best": {"val_loss": 0.0812, "val_acc": 0.9778, "step": 637, "epoch": 13},
    "final": {"val_loss": 0.0954, "val_acc": 0.9722},
    "images_per_s": 1_234.6,
    "data_wait_share": 0.0312,
    "restarts": 1,
    "quarantined": 2,
    "micro_batch": {"asked": 16, "used": 8, "eval_asked": 64, "eval_used": 64},
    "wall_s": 95.0,
    "decisions": {
        "precision": "32: this CPU has no bf16 instructions: it would be slower",
        "strategy": "ddp: the model fits every worker",
        "decode_slots": 2,
    },
}
EVALUATION: dict[str, Any] = {
    "split": "val",
    "checkpoint": "best",
    "step": 637,
    "samples": 360,
    "accuracy": 0.9778,
    "loss": 0.0812,
    "images_per_s": 5_000.0,
    "precision": "32",
    "batch": 256,
    "classes": [
        {"name": "cat", "samples": 200, "correct": 199, "accuracy": 0.995},
        {"name": "dog", "samples": 160, "correct": 153, "accuracy": 0.95625},
    ],
}


def metrics_table(rows: list[tuple[int, str, float]]) -> pa.Table:
    """Return a tidy metrics table; time is the row number."""
    steps, names, values = zip(*rows, strict=True)
    return pa.table(
        {
            "step": pa.array(steps, pa.int64()),
            "epoch": pa.array([0] * len(rows), pa.int64()),
            "samples": pa.array(steps, pa.int64()),
            "time": pa.array(range(len(rows)), pa.float64()),
            "name": pa.array(names, pa.string()),
            "value": pa.array(values, pa.float64()),
        }
    )


def training_rows(num_steps: int = 200) -> list[tuple[int, str, float]]:
    rows = [(s, "train_loss", 2.3 * math.exp(-s / 60) + 0.1) for s in range(0, num_steps, 5)]
    rows += [(s, "lr", 0.001 * (1 - s / num_steps)) for s in range(0, num_steps, 5)]
    for step in range(50, num_steps + 1, 50):
        rows += [(step, "val_loss", 2.0 * math.exp(-step / 60)), (step, "val_acc", step / 210)]
    return rows


def write_run(run: Path, *, name: str = "cat") -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_result(str(run), RESULT)
    append_event(str(run), "decision", what="precision", choice="32")
    append_event(str(run), "restart", reason=f"worker 1 died {name}", step=300)
    classes = [{**EVALUATION["classes"][0], "name": name}, EVALUATION["classes"][1]]
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "classes": classes}))
    quarantine = {
        "uri": [f"s3://bucket/{name}/a|b.png", "s3://bucket/dog/2.png"],
        "id": ["cat/1.png", "dog/2.png"],
        "reason": ["not an image", f"header says {name}"],
        "epoch": [0, 0],
    }
    pq.write_table(pa.table(quarantine), run / "quarantine.parquet")
    pq.write_table(metrics_table(training_rows()), run / "metrics.parquet")


def test_a_report_says_what_happened(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    write_run(run)
    assert write_report(str(run)) == str(run / "report.html")
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    for text in (html, markdown):
        assert "97.78 % accuracy on 360 val images, converged after 23 epochs." in text
        assert "it would be slower" in text
        assert "1 min 35 s" in text
        assert "3.12 %" in text
        assert "s3://bucket/dog/2.png" in text
        assert "worker 1 died" in text
        assert "restart: 1" in text
        assert "micro-batches of 8 samples in place of 16" in text
    assert "| precision | 32 | this CPU has no bf16 instructions: it would be slower |" in markdown
    assert "| dog | 160 | 153 | 95.62 % |\n| cat | 200 | 199 | 99.50 % |" in markdown
    assert "| val_acc | 97.78 % | 97.22 % |" in markdown


def test_pictures_are_files_for_markdown_and_part_of_the_html(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    write_run(run)
    write_report(str(run))
    markdown, html = (run / "report.md").read_text(), (run / "report.html").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert linked == ["report-loss.png", "report-accuracy.png", "report-other.png"]
    pictures = [(run / name).read_bytes() for name in linked]
    assert all(picture.startswith(PNG) for picture in pictures)
    embedded = re.findall(r'<img src="data:image/png;base64,(.*?)"', html)
    assert [base64.b64decode(data) for data in embedded] == pictures
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []


def test_untrusted_names_stay_text(tmp_path: Path) -> None:
    run = tmp_path / "<img src=x onerror=alert(1)>"
    write_run(run, name=HOSTILE)
    rows = [(1, f"val_{HOSTILE}_loss", 1.0), (1, "_$\\frac{_loss", 1.0), (1, "$\\x", 2.0)]
    pq.write_table(metrics_table(rows), run / "metrics.parquet")
    write_report(str(run))
    for file in ("report.html", "report.md"):
        text = (run / file).read_text()
        assert "<script" not in text
        assert "<img src=x" not in text
        assert "&lt;script&gt;" in text


def test_untrusted_names_do_not_break_a_markdown_table(tmp_path: Path) -> None:
    run = tmp_path / "digits"
    write_run(run, name="a|b\n\n# c [x](y) `d` *e*")
    write_report(str(run))
    markdown = (run / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if line.startswith("| a"))
    assert row == r"| a\|b # c \[x\](y) \`d\` \*e\* | 200 | 199 | 99.50 % |"
    assert not any(line.startswith("# c") for line in markdown.splitlines())


def test_a_run_that_has_not_finished_gets_a_report(tmp_path: Path) -> None:
    append_event(str(tmp_path), "restart", reason="preempted")
    write_report(str(tmp_path))
    markdown = (tmp_path / "report.md").read_text()
    assert "has not finished." in markdown
    assert "preempted" in markdown
    assert "## Curves" not in markdown
    assert not list(tmp_path.glob("*.png"))


def test_a_failed_run_is_marked(tmp_path: Path) -> None:
    write_result(str(tmp_path), {**RESULT, "stop_reason": "failed", "best": {}})
    write_report(str(tmp_path))
    html = (tmp_path / "report.html").read_text()
    assert 'class="outcome failed"' in html
    assert "failed after 23 epochs." in html


@pytest.mark.parametrize(
    ("result", "evaluation", "line"),
    [
        ({}, {}, "r has not finished."),
        ({"stop_reason": "max_epochs", "epochs": 3}, {}, "r: max_epochs after 3 epochs."),
        (RESULT, {}, "r: 97.78 % validation accuracy, converged after 23 epochs."),
        ({}, EVALUATION, "r has not finished; so far 97.78 % accuracy on 360 val images."),
    ],
)
def test_the_outcome_is_one_line(
    result: dict[str, Any], evaluation: dict[str, Any], line: str
) -> None:
    assert describe_outcome("r", result, evaluation) == line


def test_a_long_quarantine_shows_its_first_twenty(tmp_path: Path) -> None:
    write_result(str(tmp_path), {**RESULT, "quarantined": 0})
    uris = [f"s3://bucket/{n:03d}.png" for n in range(50)]
    table = {"uri": uris, "id": uris, "reason": ["empty"] * 50, "epoch": [0] * 50}
    pq.write_table(pa.table(table), tmp_path / "quarantine.parquet")
    write_report(str(tmp_path))
    markdown = (tmp_path / "report.md").read_text()
    assert "50 images were left out" in markdown
    assert re.findall(r"s3://bucket/(\d+)", markdown) == [f"{n:03d}" for n in range(20)]


def test_many_events_are_counted_and_the_last_shown(tmp_path: Path) -> None:
    for n in range(130):
        append_event(str(tmp_path), "retry", attempt=n)
    write_report(str(tmp_path))
    markdown = (tmp_path / "report.md").read_text()
    assert "retry: 130; the last 100, all in events.jsonl:" in markdown
    assert "attempt: 129 " in markdown
    assert "attempt: 29 " not in markdown


def test_quarantined_images_do_not_hide_a_restart(tmp_path: Path) -> None:
    append_event(str(tmp_path), "restart", reason="preempted")
    for n in range(150):
        append_event(str(tmp_path), "quarantined", uri=f"{n}.png")
    write_report(str(tmp_path))
    markdown = (tmp_path / "report.md").read_text()
    assert "quarantined: 150, restart: 1" in markdown
    assert "reason: preempted" in markdown
    assert "149.png" not in markdown


def test_a_step_done_again_counts_with_its_newest_value() -> None:
    table = metrics_table([(1, "m", 5.0), (2, "m", 6.0), (2, "m", 7.0), (3, "m", math.nan)])
    (curve,) = plots.read_curves(table)
    assert curve.steps.tolist() == [1, 2]
    assert curve.values.tolist() == [5.0, 7.0]
    assert curve.num_not_finite == 1


def test_values_that_cannot_be_drawn_are_counted() -> None:
    table = metrics_table([(1, "train_loss", 1.0), (2, "train_loss", math.inf)])
    pictures, notes = draw_pictures(table, best_step=None)
    assert [p.file for p in pictures] == ["report-loss.png"]
    assert notes == ["train_loss: 1 values are not finite and not drawn."]


def test_too_many_other_metrics_are_named_and_not_drawn() -> None:
    table = metrics_table([(1, f"m{n}", 1.0) for n in range(30)])
    assert draw_pictures(table, best_step=None) == (
        [],
        ["30 other metrics are in metrics.parquet, too many to draw."],
    )


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("train_loss", "loss"),
        ("val_acc", "accuracy"),
        ("val_top5_accuracy", "accuracy"),
        ("lr", "other"),
        ("glossiness", "other"),
    ],
)
def test_metrics_are_grouped_by_name(name: str, group: str) -> None:
    assert plots.group_of(name) == group


@pytest.mark.slow
def test_a_run_in_a_bucket_gets_its_report_there(s3: S3Server, tmp_path: Path) -> None:
    write_run(tmp_path)
    run = storage.join(s3.make_bucket("report-test"), "runs", "digits")
    for file in tmp_path.iterdir():
        storage.upload(file, storage.join(run, file.name))
    assert write_report(run) == f"{run}/report.html"
    assert b"97.78 % accuracy" in storage.read_bytes(f"{run}/report.md")
    assert storage.read_bytes(f"{run}/report-loss.png").startswith(PNG)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run; check --run"):
        write_report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["result.json", "metrics.parquet", "quarantine.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_bytes(b"{ not what it should be")
    with pytest.raises(UserError, match=rf"{name} is damaged .*delete it"):
        write_report(str(tmp_path))
    assert not (tmp_path / "report.md").exists()


def test_a_run_that_stopped_within_its_first_epoch_says_why_and_when(tmp_path: Path) -> None:
    write_run(tmp_path / "early")
    stopping = {
        "monitor": "val_loss", "mode": "min", "best": 0.25, "best_step": 40, "validations": 6,
        "waited": 3, "reason": "3 validations in a row did not beat val_loss 0.25 of step 40",
    }  # fmt: skip
    best = {"val_loss": 0.25, "step": 40, "epoch": 0}
    ended = {**RESULT, "epochs": 0, "steps": 90, "best": best, "early_stopping": stopping}
    write_result(str(tmp_path / "early"), ended)
    write_report(str(tmp_path / "early"))
    markdown = (tmp_path / "early" / "report.md").read_text()
    assert "converged after 90 steps of the first epoch" in markdown
    assert "converged: 3 validations in a row did not beat val_loss 0.25 of step 40" in markdown
    assert "best val_loss 0.25 at step 40, of 6 validations" in markdown
    assert "step 40, within the first epoch" in markdown
