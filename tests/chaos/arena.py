"""A run to be killed: its data, its config, its driver as a real process, and where it is."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from packed import write_packed

from orchestrator import configfile
from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    Strategy,
    TrainConfig,
)

TESTS = Path(__file__).resolve().parents[1]
MARK = "ORCHESTRATOR_CHAOS"
GLOBAL_BATCH, WORKERS, EPOCHS = 12, 2, 2
HANG_TIMEOUT_S = 8.0
_COMMAND = "import sys; from orchestrator.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclasses.dataclass(frozen=True)
class Sign:
    """One line that the module wrote: a step that began."""

    at: float
    pid: int
    step: int


class Arena:
    """One run and its driver.

    Args:
        folder: all of it lies here.
        data: URI of a packed data set.
        pause_s: what a step takes while kills are under way.
        strategy: `train.strategy`.
        workers: how many train it.
    """

    def __init__(
        self,
        folder: Path,
        data: str,
        *,
        pause_s: float,
        strategy: Strategy = "ddp",
        workers: int = WORKERS,
    ) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        """Where its processes put temporary folders."""
        self.temporary.mkdir(parents=True)
        # Short: the names of Ray's sockets below it may have 107 characters in all.
        self._sessions = Path(tempfile.mkdtemp(prefix="ray-"))
        self.mark = uuid.uuid4().hex
        """The value of `MARK` in its processes' environment."""
        self.config = Config(
            name="run",
            storage_path=str(folder),
            data=DataConfig(
                index=data,
                global_batch=GLOBAL_BATCH,
                max_micro_batch=GLOBAL_BATCH,
                eval_batch=32,
                image_size=8,
                audit=True,
            ),
            model=ModelConfig(
                class_path="chaos.model.Paced",
                init_args={"folder": str(folder), "pause_s": pause_s},
            ),
            train=TrainConfig(
                max_epochs=EPOCHS,
                precision="32",
                strategy=strategy,
                early_stopping=None,
                checkpoint=CheckpointConfig(every_steps=2),
                max_failures=1000,
                hang_timeout_s=HANG_TIMEOUT_S,
            ),
            scaling=ScalingConfig(num_workers=workers),
        )
        (folder / "chaos.yaml").write_text(configfile.dump(self.config))
        self.address = ""
        """A Ray cluster to use; empty: the driver starts its own."""
        self.driver: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def env(self) -> dict[str, str]:
        """Variables of all processes that work for the run."""
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return {
            MARK: self.mark,
            "PYTHONPATH": paths,
            "TMPDIR": str(self.temporary),
            "RAY_TMPDIR": str(self._sessions),
        }

    @property
    def run(self) -> str:
        """URI of the run's folder."""
        return str(self.folder / "run")

    def submit(self) -> None:
        """Start the driver; the command is always the same."""
        env = os.environ | self.env
        if self.address:
            env["RAY_ADDRESS"] = self.address
        self.starts += 1
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "train", "--config", "chaos.yaml"],
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def calm(self) -> None:
        """Let the run go at full speed from now on."""
        (self.folder / "calm").touch()

    def signs(self) -> list[Sign]:
        """Return all steps that began, in order, those of redone steps too."""
        path = self.folder / "steps"
        lines = path.read_text().splitlines() if path.exists() else []
        parts = [line.split() for line in lines]
        return [Sign(float(p[0]), int(p[1]), int(p[2])) for p in parts if len(p) == 3]

    @property
    def pid(self) -> int:
        """The driver's process id."""
        assert self.driver is not None
        return self.driver.pid

    @property
    def ended(self) -> int | None:
        """The driver's exit code, or None while it runs."""
        assert self.driver is not None
        return self.driver.poll()

    def end(self) -> None:
        """End the driver if it still runs."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.send_signal(signal.SIGINT)
            try:
                self.driver.wait(20)
            except subprocess.TimeoutExpired:
                self.driver.kill()
                self.driver.wait()

    def close(self) -> None:
        """End the driver, and delete the logs of its clusters."""
        self.end()
        shutil.rmtree(self._sessions, ignore_errors=True)

    def log_tail(self) -> str:
        """Return the end of what the driver printed."""
        return (self.folder / "driver.log").read_text(errors="replace")[-3000:]


def write_data(folder: Path, *, kills: int) -> str:
    """Write a data set with as many images as a run with so many kills consumes."""
    # Some ten new steps between two kills; a prime number more, so that steps straddle epochs.
    samples = 5 * GLOBAL_BATCH * (kills + 4) + 7
    index = write_packed(
        folder, train=samples, val=16, chunk_rows=16, shard_rows=200, num_classes=3
    )
    return index.uri


def await_end(arena: Arena, *, timeout_s: float) -> int:
    """Wait for the driver's end and return its exit code.

    Raises:
        TimeoutError: it does not come.
    """
    assert arena.driver is not None
    try:
        return arena.driver.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no end within {timeout_s:g} s:\n{arena.log_tail()}") from None


def await_step(
    arena: Arena, *, after: int, since: float, old: frozenset[int], timeout_s: float
) -> Sign | None:
    """Return the first sign of a step beyond `after`; None: the driver ended.

    Args:
        arena: the run.
        after: the step.
        since: signs from before this time do not count.
        old: nor do those of these processes.
        timeout_s: how long to wait.

    Raises:
        TimeoutError: it does not come.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for sign in arena.signs():
            if sign.at > since and sign.step > after and sign.pid not in old:
                return sign
        if arena.ended is not None:
            return None
        time.sleep(0.05)
    raise TimeoutError(f"no new step within {timeout_s:g} s:\n{arena.log_tail()}")
