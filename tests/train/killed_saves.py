"""Kills a process that saves checkpoints, before every file operation in turn or at random moments.

    python killed_saves.py FOLDER every     SIGKILL before file operation 1, 2, 3, ...
    python killed_saves.py FOLDER random N SEED

Each killed run is gone on with in another process, which checks all that was promised. Prints the
number of kills and the steps that runs went on from.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import saves
import torch

STEPS, EVERY = 4, 2
_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def in_child(action: Callable[..., object], *args: object) -> int:
    """Run `action` in a forked process and return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            action(*args)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return pid


def killed_by(pid: int) -> bool:
    """Wait for a process; return whether it was killed, and raise if it failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def kill_before(operation: int, folder: str) -> None:
    """Let SIGKILL end this process before its n-th operation that changes files of a folder."""
    seen = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in _OPERATIONS or not str(args[0]).startswith(folder):
            return
        if event == "open" and not int(str(args[2])) & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def train(run: str) -> None:
    saves.train(run, steps=STEPS, every=EVERY, keep=1)


def train_until_killed(run: str, operation: int) -> None:
    kill_before(operation, run)
    train(run)


def go_on(run: str, scratch: Path) -> None:
    """Go on with a killed run and check it; its folder is deleted where all is well."""
    step = saves.resume(run, scratch, steps=STEPS, every=EVERY, keep=1)
    saves.assert_complete(run, steps=STEPS)
    shutil.rmtree(run)
    shutil.rmtree(scratch, ignore_errors=True)
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()


def kill_at_every_operation(folder: Path) -> int:
    operation = 0
    while True:
        operation += 1
        run = str(folder / f"run-{operation}")
        if not killed_by(in_child(train_until_killed, run, operation)):
            return operation - 1
        assert not killed_by(in_child(go_on, run, folder / "scratch"))


def kill_at_random(folder: Path, kills: int, seed: int) -> int:
    rng, count = random.Random(seed), 0
    for i in range(kills):
        run = str(folder / f"random-{i}")
        pid = in_child(train, run)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        count += killed_by(pid)
        assert not killed_by(in_child(go_on, run, folder / "scratch"))
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)  # OpenMP's threads would not survive a fork
    if sys.argv[2] == "every":
        number = kill_at_every_operation(Path(sys.argv[1]))
    else:
        number = kill_at_random(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write(f"kills {number}\n")
