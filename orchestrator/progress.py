"""A person watching: workers post where they are to a small actor, the driver shows it."""

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

import ray
import ray.exceptions
import rich.console
import rich.live
import rich.text
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

_POLL_S = 0.5  # said lines appear "at once": within this time
_READ_TIMEOUT_S = 10.0
_KEPT_LINES = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is; None: not known (yet)."""

    phase: str
    """What happens now: "train", "validate", ..."""
    run: str = ""
    """Name of the run."""
    step: int = 0
    """Optimizer steps done."""
    steps: int | None = None
    """Steps until the last epoch's end; early stopping may end sooner."""
    epoch: int = 0
    """Passes over the training data begun."""
    epochs: int | None = None
    """Upper bound on passes."""
    loss: float | None = None
    """Training loss of the last steps."""
    images_per_s: float | None = None
    """Images consumed per second by all workers."""
    wait_share: float | None = None
    """Share of time spent waiting for data, 0 to 1."""
    eta_s: float | None = None
    """Seconds until `steps` are done."""


class Board:
    """The actor's state: the newest progress, and lines for a person."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._num_said = 0
        self._made_steps = False
        self._stuck: dict[int, float] = {}
        self._kept: dict[str, Any] = {}

    def post(self, progress: Progress) -> None:
        """Replace the progress that is shown."""
        self._progress = progress
        self._made_steps = True

    def start(self) -> None:
        """Note that workers start: what is shown is of an earlier start."""
        self._made_steps = False
        self._stuck.clear()
        if self._progress is not None:
            self._progress = dataclasses.replace(self._progress, phase="starting")

    def made(self) -> int | None:
        """Return the step that is shown, or None where this start has made none."""
        return self._progress.step if self._progress and self._made_steps else None

    def stuck(self, rank: int, fresh_s: float) -> int:
        """Note that a worker's step does not end; return how many said so within `fresh_s`."""
        now = time.monotonic()
        self._stuck[rank] = now
        return sum(now - at <= fresh_s for at in self._stuck.values())

    def keep(self, name: str, value: Any) -> None:
        """Keep a handle of something that the driver would have to clear away."""
        self._kept[name] = value

    def kept(self) -> dict[str, Any]:
        """Return all that is kept, by name."""
        return dict(self._kept)

    def say(self, line: str) -> None:
        """Show a line once, above the live line."""
        self._lines.append(line)
        self._num_said += 1

    def read(self, since: int) -> tuple[Progress | None, list[str], int]:
        """Return the progress, the lines said after the first `since`, and how many were said."""
        first = self._num_said - len(self._lines)
        lines = list(self._lines)[max(0, since - first) :]
        if first > since:
            lines.insert(0, f"({first - since} lines left out)")
        return self._progress, lines, self._num_said


def start_board() -> Any:
    """Start a board actor on this node, which outlives spot workers; it takes no CPU."""
    here = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=strategy).remote()


@contextlib.contextmanager
def display(board: Any, *, stream: TextIO, interval_s: float = 5.0) -> Iterator[None]:
    """Show a board on `stream` while the block runs.

    A terminal gets one live line; anything else a plain line every `interval_s` when something
    changed. Said lines appear at once. Losing the board ends the display, never the run.
    """
    screen = _open_screen(stream, interval_s=interval_s)
    done = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(board, screen, done), name="progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2 * _READ_TIMEOUT_S)
        screen.close()


def _follow(board: Any, screen: "_Screen", done: threading.Event) -> None:
    since = 0
    last = False
    while not last:
        last = done.wait(_POLL_S)  # one more read after the end: nothing said is lost
        # After a ray.shutdown, ray.get would start a new cluster.
        if not ray.is_initialized():
            return
        try:
            reply = ray.get(board.read.remote(since), timeout=_READ_TIMEOUT_S)
            progress, lines, since = reply
            screen.show(progress, lines, last=last)
        except ray.exceptions.GetTimeoutError:
            continue
        except (ray.exceptions.RayError, OSError, ValueError) as error:
            # OSError, ValueError: the stream was closed under us.
            logger.warning("progress is no longer shown, the run goes on: %s", error)
            return


class _PlainScreen:
    """Lines for a log file or a pipe."""

    def __init__(self, stream: TextIO, *, interval_s: float) -> None:
        self._stream = stream
        self._polls_per_line = max(1, round(interval_s / _POLL_S))
        self._polls = self._polls_per_line
        self._shown: Progress | None = None

    def show(self, progress: Progress | None, lines: list[str], *, last: bool) -> None:
        out = [printable(line) for line in lines]
        self._polls += 1
        due = last or self._polls >= self._polls_per_line
        if progress is not None and progress != self._shown and due:
            out.append(format_line(progress))
            self._shown, self._polls = progress, 0
        if out:
            self._stream.write("\n".join(out) + "\n")
            self._stream.flush()

    def close(self) -> None:
        return None


class _LiveScreen:
    """One line that is redrawn, with said lines scrolling above it."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._live = rich.live.Live(console=console, auto_refresh=False)
        self._live.start()

    def show(self, progress: Progress | None, lines: list[str], *, last: bool) -> None:
        for line in lines:
            self._console.print(rich.text.Text(printable(line)))
        if progress is not None:
            text = rich.text.Text(format_line(progress), no_wrap=True, overflow="ellipsis")
            text.stylize("bold cyan", 0, len(printable(progress.phase)))
            self._live.update(text, refresh=True)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            self._live.stop()


_Screen = _PlainScreen | _LiveScreen


def _open_screen(stream: TextIO, *, interval_s: float) -> _Screen:
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return _LiveScreen(rich.console.Console(file=stream, force_terminal=True))
    return _PlainScreen(stream, interval_s=interval_s)


def format_line(progress: Progress) -> str:
    """Return one line for a person, leaving out what is not known."""
    parts = [
        f"{progress.phase} {progress.run}".strip(),
        f"step {_of(progress.step, progress.steps)}",
        f"epoch {_of(progress.epoch, progress.epochs)}",
    ]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.images_per_s is not None:
        parts.append(f"{progress.images_per_s:,.0f} images/s")
    if progress.wait_share is not None:
        parts.append(f"waiting for data {100 * progress.wait_share:.0f} %")
    if progress.eta_s is not None:
        parts.append(f"ETA {format_duration(progress.eta_s)}")
    return printable("  ".join(parts))


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def format_duration(seconds: float) -> str:
    """Return seconds as its two largest units: "42 s", "3 min 05 s", "2 h 10 min", "4 d 03 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3_600} h {whole % 3_600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3_600:02d} h"


def printable(line: str) -> str:
    """Return a line whose control characters are spelled out: a file name moves no cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
