"""Kills one run again and again, and notes what each kill cost."""

import dataclasses
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos import victims
from chaos.arena import Arena, await_end, await_step
from chaos.nodes import Nodes
from orchestrator.train.saving.checkpoint import MANIFEST_FILE

_STEP_TIMEOUT_S = 120.0
# How long a save is waited for: the module is slow, so one comes every second or so.
_SAVE_TIMEOUT_S = 3.0
# A restart takes some ten seconds.
_RUSH_S = 8.0


@dataclasses.dataclass
class Kill:
    """One kill and what followed."""

    target: str
    pid: int
    moment: str
    """"random", or "save": a checkpoint lay half written."""
    step: int
    """The highest step that had begun."""
    at: float
    """Seconds since 1970."""
    known: frozenset[int]
    """Processes that had trained by then."""
    number: int = 0
    first_s: float | None = None
    """Seconds until a step began in a new process; None: none was lost."""
    new_s: float | None = None
    """Seconds until a step began that had not begun before; None: not waited for, or the end."""
    driver_mb: float = 0.0
    """The driver's resident memory by then."""

    def row(self) -> str:
        """Return the line of the table."""
        seconds = [f"{s:.1f}" if s is not None else "-" for s in (self.first_s, self.new_s)]
        return (
            f"{self.number:4} {self.target:11} {self.pid:8} {self.moment:6} {self.step:6} "
            f"{seconds[0]:>8} {seconds[1]:>8} {self.driver_mb:8.0f}"
        )


HEADER = "kill target           pid moment   step  restart      new driver MB"


def fight(
    arena: Arena,
    *,
    targets: Sequence[str],
    rng: random.Random,
    say: Callable[[str], None],
    nodes: Nodes | None = None,
    deadline: float = float("inf"),
    rush: float = 0.0,
) -> list[Kill]:
    """Submit the run, kill targets in turn and let it end; a killed driver is resubmitted.

    Args:
        arena: the run.
        targets: what to kill, one after the other.
        rng: chooses processes and moments.
        say: shows a line.
        nodes: the cluster, where "node" is a target.
        deadline: `time.monotonic()` after which no further kill begins.
        rush: share of kills that the next one follows before the run has got any further.

    Raises:
        TimeoutError: the run does not go on.
        AssertionError: the driver ended by itself with an error.
    """
    done: list[Kill] = []
    arena.submit()
    await_step(arena, after=0, since=0.0, old=frozenset(), timeout_s=_STEP_TIMEOUT_S)
    say(HEADER)
    for target in targets:
        kill = None if time.monotonic() > deadline else _strike(arena, target, rng, nodes)
        if kill is None:
            break
        kill.number = len(done) + 1
        if rng.random() < rush:
            time.sleep(rng.uniform(0.0, _RUSH_S))
        else:
            _await_progress(arena, kill)
        kill.driver_mb = victims.resident_mb(arena.driver.pid) if arena.driver else 0.0
        done.append(kill)
        say(kill.row())
    arena.calm()
    code = await_end(arena, timeout_s=180)
    assert code == 0, f"the driver ended with {code}:\n{arena.log_tail()}"
    return done


def _strike(arena: Arena, target: str, rng: random.Random, nodes: Nodes | None) -> Kill | None:
    """Kill once, and start the driver again if it was that; None: the run ended before."""
    time.sleep(rng.uniform(0.0, 2.0))
    moment = "save" if rng.random() < 0.4 and _await_save(arena) else "random"
    if arena.ended is not None:
        return None
    assert arena.driver is not None
    signs, at = arena.signs(), time.time()
    pid = _kill(arena, target, rng, nodes)
    if pid is None:  # none lives at this moment of a start
        return _strike(arena, target, rng, nodes)
    if target == "driver":
        arena.driver.wait()
        arena.submit()
    step, known = max(sign.step for sign in signs), frozenset(sign.pid for sign in signs)
    return Kill(target=target, pid=pid, moment=moment, step=step, at=at, known=known)


def _await_progress(arena: Arena, kill: Kill) -> None:
    # What is left of the old workers may step on for a moment.
    restarts = kill.target in ("worker", "stopped", "coordinator", "controller", "driver")
    old = kill.known if restarts else frozenset()
    new = await_step(arena, after=kill.step, since=kill.at, old=old, timeout_s=_STEP_TIMEOUT_S)
    later = (s for s in arena.signs() if s.at > kill.at and s.pid not in kill.known)
    first = next(later, None)
    kill.first_s = first.at - kill.at if first else None
    kill.new_s = new.at - kill.at if new else None


def _kill(arena: Arena, target: str, rng: random.Random, nodes: Nodes | None) -> int | None:
    if target == "node":
        assert nodes is not None
        return nodes.kill_one(rng)
    assert arena.driver is not None
    pid = arena.driver.pid if target == "driver" else victims.choose(target, arena.mark, rng)
    number = signal.SIGSTOP if target == "stopped" else signal.SIGKILL
    return pid if pid is not None and victims.kill(pid, number) else None


def _await_save(arena: Arena) -> bool:
    """Return once a checkpoint lies half written, or False where none does in time."""
    folder = Path(arena.run) / "checkpoints"
    deadline = time.monotonic() + _SAVE_TIMEOUT_S
    while time.monotonic() < deadline:
        newest = max(folder.glob("step-*"), default=None)
        if newest is not None and not (newest / MANIFEST_FILE).exists():
            return True
        time.sleep(0.001)
    return False
