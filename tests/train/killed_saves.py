"""Kills processes that save checkpoints, before every operation in turn or at random moments.

    python killed_saves.py every RUNS           SIGKILL before operation 1, 2, 3, ... on storage
    python killed_saves.py one RUNS RANK        the same to one of two worker processes; the other
                                                is killed a moment later, as Ray Train does
    python killed_saves.py random RUNS N SEED   N runs, at a random moment each
    python killed_saves.py poll RUNS N SEED     200 saves of one run, and N kills at random moments

RUNS is a folder, or a bucket for `every` and `random`. Each killed run is gone on with in another
process, which checks all that was promised. Prints the steps that runs went on from (for `poll`,
those of the newest checkpoint, which is there and whole at every look), then the number of kills.
"""

import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import saves
import torch

from orchestrator import storage
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.checkpoint import CheckpointError

STEPS, EVERY = 4, 2
POLLED_SAVES = 200
_ON_FILES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
_ON_STORAGE = ("create", "write_atomic", "upload", "delete_file", "delete_folder")


def in_child(action: Callable[..., object], *args: object) -> int:
    """Run `action` in a forked process and return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            action(*args)
            os._exit(0)
        except BaseException as error:  # a forked child must not go on as the test's process
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return pid


def killed_by(pid: int) -> bool:
    """Wait for a process; return whether it was killed, and raise if it failed."""
    _, status = os.waitpid(pid, 0)
    return _was_killed(status)


def _was_killed(status: int) -> bool:
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


class Countdown:
    """Lets SIGKILL end this process before its n-th operation."""

    def __init__(self, operation: int) -> None:
        self._left = operation

    def count(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_before(operation: int, runs: str) -> None:
    """Let SIGKILL end this process before its n-th operation that changes what lies there."""
    countdown = Countdown(operation)
    if storage.is_remote(runs):
        for name in _ON_STORAGE:
            setattr(storage, name, _counted(getattr(storage, name), countdown))
        return

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event not in _ON_FILES or not str(args[0]).startswith(runs):
            return
        if event == "open" and not int(str(args[2])) & (os.O_WRONLY | os.O_RDWR):
            return
        countdown.count()

    sys.addaudithook(watch)


def _counted(function: Callable[..., Any], countdown: Countdown) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        countdown.count()
        return function(*args, **options)

    return wrapped


def train(run: str) -> None:
    saves.train(run, steps=STEPS, every=EVERY, keep=1)


def train_until_killed(run: str, operation: int) -> None:
    kill_before(operation, run)
    train(run)


def go_on(run: str) -> None:
    """Go on with a killed run and check it; it is deleted where all is well."""
    with tempfile.TemporaryDirectory() as scratch:
        step = saves.resume(run, Path(scratch), steps=STEPS, every=EVERY, keep=1)
    saves.assert_complete(run, steps=STEPS)
    storage.delete_folder(run)
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()


def kill_at_every_operation(runs: str) -> int:
    operation = 0
    while True:
        operation += 1
        run = f"{runs}/run-{operation}"
        if not killed_by(in_child(train_until_killed, run, operation)):
            return operation - 1
        assert not killed_by(in_child(go_on, run))


def gather_over(end: socket.socket, rank: int) -> Callable[[Any], list[Any]]:
    """Return a gather of two processes."""
    stream = end.makefile("rwb")

    def gather(mine: Any) -> list[Any]:
        pickle.dump(mine, stream)
        stream.flush()
        other = pickle.load(stream)
        return [mine, other] if rank == 0 else [other, mine]

    return gather


def train_apart(run: str, rank: int, ends: tuple[socket.socket, ...], operation: int) -> None:
    ends[1 - rank].close()
    kill_before(operation, run)
    gather = gather_over(ends[rank], rank)
    saves.work(run, rank, gather, steps=STEPS, every=EVERY, keep=1)


def kill_one_at_every_operation(runs: str, rank: int) -> int:
    operation = 0
    while True:
        operation += 1
        run, ends = f"{runs}/one-{operation}", socket.socketpair()
        whens = [operation if each == rank else 0 for each in range(2)]
        pids = [in_child(train_apart, run, each, ends, when) for each, when in enumerate(whens)]
        for end in ends:
            end.close()
        if not killed_by(pids[rank]):
            assert not killed_by(pids[1 - rank])
            return operation - 1
        time.sleep(0.05)
        os.kill(pids[1 - rank], signal.SIGKILL)
        os.waitpid(pids[1 - rank], 0)  # it may have lost the other before
        assert not killed_by(in_child(go_on, run))


def kill_at_random(runs: str, kills: int, seed: int) -> int:
    rng, count = random.Random(seed), 0
    for i in range(kills):
        run = f"{runs}/random-{i}"
        pid = in_child(train, run)
        time.sleep(rng.uniform(0.0, 1.0 if storage.is_remote(runs) else 0.1))
        os.kill(pid, signal.SIGKILL)
        count += killed_by(pid)
        assert not killed_by(in_child(go_on, run))
    return count


def save_often(run: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        saves.resume(run, Path(scratch), steps=POLLED_SAVES, every=1, keep=2)


def newest_step(run: str, scratch: Path) -> int:
    """Return the step of the newest checkpoint, all its checksums compared, or -1: there is none.

    Raises:
        CheckpointError: it is not whole.
    """
    for last_try in (False, False, True):
        manifests = checkpoint.list_manifests(run)
        if not manifests:
            return -1
        try:
            checkpoint.fetch(run, manifests[-1], scratch)
            return manifests[-1].step
        except (CheckpointError, storage.MissingError):
            if last_try:  # before, it may have been pruned since there were newer ones
                raise
    raise AssertionError


def kill_while_polling(run: str, kills: int, seed: int) -> int:
    rng, count = random.Random(seed), 0
    seen, scratch = [-1], Path(tempfile.mkdtemp(dir=Path(run).parent))
    while seen[-1] < POLLED_SAVES:
        pid, until = in_child(save_often, run), seen[-1] + rng.randint(1, POLLED_SAVES // kills)
        while True:
            seen.append(newest_step(run, scratch))
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                count += _was_killed(status)
                break
            time.sleep(rng.uniform(0.0, 0.005))
            if count < kills and seen[-1] >= until:
                os.kill(pid, signal.SIGKILL)
        seen.append(newest_step(run, scratch))
    assert seen == sorted(seen)
    shutil.rmtree(scratch)
    saves.assert_complete(run, steps=POLLED_SAVES)
    assert [m.step for m in checkpoint.list_manifests(run)] == [POLLED_SAVES - 1, POLLED_SAVES]
    sys.stdout.write("".join(f"{step}\n" for step in seen))
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)  # OpenMP's threads would not survive a fork
    mode, where, numbers = sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]]
    modes: dict[str, Callable[..., int]] = {
        "every": kill_at_every_operation,
        "one": kill_one_at_every_operation,
        "random": kill_at_random,
        "poll": kill_while_polling,
    }
    sys.stdout.write(f"kills {modes[mode](where, *numbers)}\n")
