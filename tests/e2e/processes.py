"""Commands of ours and of Ray as a user runs them: own processes, a clean environment, no leaks.

A variable with a value of its own marks a command and all that it starts, in whatever process group
Ray puts them: that is how tests find what is left behind, and end nothing that is not theirs.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_MARK = "ORCHESTRATOR_TEST_SESSION"
_END_TIMEOUT_S = 5
_BIN = Path(sys.executable).parent


@dataclasses.dataclass(frozen=True)
class Session:
    """A folder and an environment in which commands run, and what they leave running."""

    folder: Path
    env: dict[str, str]

    def run(
        self, *command: str, timeout_s: float, **env: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a console script of this Python to its end; stderr is part of stdout."""
        return subprocess.run(
            [str(_BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    @contextlib.contextmanager
    def running(self, *command: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a console script beside the block, in a process group of its own."""
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [str(_BIN / command[0]), *command[1:]],
                cwd=self.folder,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                _end_group(process)

    def left_running(self) -> dict[int, str]:
        """Return the command lines, by process id, of all that was started here and still runs."""
        mark = f"{_MARK}={self.env[_MARK]}".encode()
        left = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    left[int(folder.name)] = command.decode(errors="replace")
        return left


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def session(folder: Path, **env: str) -> Iterator[Session]:
    """Give commands an empty home, this Python's scripts and `env`; end what they leave."""
    home = folder / "home"
    home.mkdir()
    base = {"PATH": f"{_BIN}:{os.environ['PATH']}", "HOME": str(home), _MARK: uuid.uuid4().hex}
    made = Session(folder, base | env)
    try:
        yield made
    finally:
        for process_id in made.left_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


def wait_until(holds: Callable[[], object], *, timeout_s: float, otherwise: object) -> None:
    """Return once `holds()` is true.

    Raises:
        TimeoutError: with `otherwise`, or what it returns: it has not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise() if callable(otherwise) else otherwise)
        time.sleep(0.1)
