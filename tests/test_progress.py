"""A person watching: formatting, the board, and the display over a real Ray actor."""

import io
import time
from typing import Any

import pytest
import ray

from orchestrator import progress as progress_module
from orchestrator.progress import (
    Board,
    Progress,
    display,
    format_duration,
    format_line,
    printable,
    start_board,
)

FULL = Progress(
    phase="train",
    run="digits",
    step=1_200,
    steps=4_000,
    epoch=3,
    epochs=10,
    loss=0.43217,
    images_per_s=1_234.5,
    wait_share=0.034,
    eta_s=185,
)


def test_a_line_names_everything_known() -> None:
    assert format_line(FULL) == (
        "train digits  step 1,200/4,000  epoch 3/10  loss 0.4322  1,234 images/s  "
        "waiting for data 3 %  ETA 3 min 05 s"
    )


def test_a_line_leaves_out_what_is_unknown() -> None:
    assert format_line(Progress(phase="pack", step=7)) == "pack  step 7  epoch 0"


def test_a_diverged_loss_is_shown() -> None:
    assert "loss nan" in format_line(Progress(phase="train", loss=float("nan")))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3_599.7, "1 h 00 min"),
        (7_800, "2 h 10 min"),
        (86_399.9, "1 d 00 h"),
        (360_000, "4 d 04 h"),
    ],
)
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    assert "\x1b" not in format_line(Progress(phase="train", run="\x1b[31m"))


def test_a_board_gives_each_line_once_and_the_newest_progress() -> None:
    board = Board()
    assert board.read(0) == (None, [], 0)
    board.say("one")
    board.post(Progress(phase="train", step=1))
    board.post(FULL)
    assert board.read(0) == (FULL, ["one"], 1)
    board.say("two")
    assert board.read(1) == (FULL, ["two"], 2)
    assert board.read(2) == (FULL, [], 2)


def test_a_board_is_bounded_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_KEPT_LINES", 3)
    board = Board()
    for n in range(5):
        board.say(str(n))
    assert board.read(0) == (None, ["(2 lines left out)", "2", "3", "4"], 5)
    assert board.read(4) == (None, ["4"], 5)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def board(ray_cluster: None) -> Any:
    return start_board()


def _wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.05)


def test_the_board_takes_no_cpu(board: Any) -> None:
    ray.get(board.read.remote(0))
    assert ray.available_resources()["CPU"] == 2


def test_a_pipe_gets_a_line_only_when_something_changed(board: Any) -> None:
    out = io.StringIO()
    with display(board, stream=out, interval_s=0.5):
        board.post.remote(FULL)
        board.say.remote("checkpoint step-1200")
        _wait_for(out, "step 1,200/4,000")
        _wait_for(out, "checkpoint step-1200")
        time.sleep(1.5)
        board.say.remote("done")
    lines = out.getvalue().splitlines()
    assert sorted(lines) == sorted(["checkpoint step-1200", format_line(FULL), "done"])


def test_a_pipe_waits_between_lines_but_shows_the_last_state(board: Any) -> None:
    out = io.StringIO()
    with display(board, stream=out, interval_s=60):
        ray.get(board.post.remote(Progress(phase="train", step=1)))
        _wait_for(out, "step 1 ")
        ray.get(board.post.remote(Progress(phase="train", step=2)))
        time.sleep(1.5)
        assert "step 2" not in out.getvalue()
        ray.get(board.post.remote(Progress(phase="train", step=3)))
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["step 1", "step 3"]


def test_a_terminal_gets_a_live_line_below_said_lines(
    board: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with display(board, stream=out):
        board.post.remote(FULL)
        _wait_for(out, "1,234 images/s")
        board.say.remote("quarantined [red]x.png[/red]")
        _wait_for(out, "quarantined [red]x.png[/red]")
    assert "\x1b[2K" in out.getvalue()  # the live line was erased and drawn again
    assert out.getvalue().rindex("images/s") > out.getvalue().index("quarantined")


def test_losing_the_board_ends_the_display_and_not_the_run(
    board: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = io.StringIO()
    finished = []
    with display(board, stream=out, interval_s=0.5):
        board.say.remote("alive")
        _wait_for(out, "alive")
        ray.kill(board)
        deadline = time.monotonic() + 30
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finished.append(True)
    assert finished == [True]
    assert "the run goes on" in caplog.records[0].message


def test_a_stream_closed_under_us_does_not_stop_the_run(
    board: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = io.StringIO()
    with display(board, stream=out):
        out.close()
        ray.get(board.say.remote("nobody hears this"))
    assert "the run goes on: I/O operation on closed file" in caplog.text


def test_the_runs_own_failure_passes_through(board: Any) -> None:
    out = io.StringIO()

    def run() -> None:
        with display(board, stream=out):
            ray.get(board.say.remote("the last words"))
            raise RuntimeError("of the run")

    with pytest.raises(RuntimeError, match="of the run"):
        run()
    assert out.getvalue() == "the last words\n"


def test_a_board_knows_what_a_start_has_done() -> None:
    board = Board()
    board.start()
    assert board.made() is None
    board.post(Progress(phase="training", step=7))
    assert board.made() == 7
    assert [board.stuck(rank, 60.0) for rank in (0, 1, 1)] == [1, 2, 2]
    assert board.stuck(2, 0.0) == 1
    board.start()
    assert board.made() is None
    shown, _, _ = board.read(0)
    assert shown == Progress(phase="starting", step=7)
    assert board.stuck(0, 60.0) == 1
