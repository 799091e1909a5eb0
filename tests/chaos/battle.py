"""Kills one run again and again, and notes what each kill cost."""

import dataclasses
import random
import time
from collections import Counter
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
    """"random", or "save": a checkpoint lay half written, before and after."""
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
    held: tuple[str, ...] = ()
    """What the run held in its cluster beyond what it had held before the first kill."""
    driver: int = 0
    """The driver's process by then."""
    driver_mb: float = 0.0
    """Its own resident memory."""

    def row(self) -> str:
        """Return the line of the table."""
        seconds = [f"{s:.1f}" if s is not None else "-" for s in (self.first_s, self.new_s)]
        return (
            f"{self.number:4} {self.target:11} {self.pid:8} {self.moment:6} {self.step:6} "
            f"{seconds[0]:>8} {seconds[1]:>8} {self.driver_mb:8.0f}"
        )


HEADER = "kill target           pid moment   step  restart      new driver MB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Battle:
    """How a run is killed."""

    arena: Arena
    rng: random.Random
    """Chooses processes and moments."""
    say: Callable[[str], None]
    """Shows a line."""
    nodes: Nodes | None = None
    """The cluster that the driver uses, if it is not the driver's own."""
    deadline: float = float("inf")
    """`time.monotonic()` after which no further kill begins."""
    rush: float = 0.0
    """Share of kills that the next one follows before the run has got any further."""
    saves: float = 0.4
    """Share of kills that wait for a save."""

    def fight(self, targets: Sequence[str]) -> list[Kill]:
        """Submit the run, kill targets in turn and let it end; a killed driver is resubmitted.

        Raises:
            TimeoutError: the run does not go on, or a target does not live.
            AssertionError: the driver ended by itself with an error.
        """
        done: list[Kill] = []
        self.arena.submit()
        await_step(self.arena, after=0, since=0.0, old=frozenset(), timeout_s=_STEP_TIMEOUT_S)
        held = self.nodes.held() if self.nodes else Counter()
        self.say(HEADER)
        for target in targets:
            kill = self._strike(target)
            if kill is None:
                break
            kill.number = len(done) + 1
            self._watch(kill, held)
            done.append(kill)
            self.say(kill.row())
        self.arena.calm()
        code = await_end(self.arena, timeout_s=180)
        assert code == 0, f"the driver ended with {code}:\n{self.arena.log_tail()}"
        return done

    def _strike(self, target: str) -> Kill | None:
        """Kill once, and put another one in its place; None: the run or the time ended before.

        Raises:
            TimeoutError: there is no such target.
        """
        time.sleep(self.rng.uniform(0.0, 2.0))
        at_save = self.rng.random() < self.saves
        give_up = time.monotonic() + _STEP_TIMEOUT_S
        while self.arena.ended is None and time.monotonic() < self.deadline:
            kill = self._try(target, at_save=at_save)
            if kill is not None:
                self._replace(kill)
                return kill
            # What does not live at this moment of a start is there after it.
            if time.monotonic() > give_up:
                tail = self.arena.log_tail()
                raise TimeoutError(f"no {target} within {_STEP_TIMEOUT_S:g} s:\n{tail}")
            time.sleep(0.1)
        return None

    def _try(self, target: str, *, at_save: bool) -> Kill | None:
        """Kill what there is of a target; None: nothing is."""
        pid = self._choose(target)
        # Only now: what chooses looks at all processes, and a save takes but some 50 ms.
        half = _await_save(self.arena) if at_save else None
        signs, at = self.arena.signs(), time.time()
        if pid is None or not victims.kill(pid, victims.signal_of(target)):
            return None
        hit = half is not None and half.exists() and not (half / MANIFEST_FILE).exists()
        return Kill(
            target=target,
            pid=pid,
            moment="save" if hit else "random",
            step=max(sign.step for sign in signs),
            at=at,
            known=frozenset(sign.pid for sign in signs),
        )

    def _choose(self, target: str) -> int | None:
        if target == "node":
            assert self.nodes is not None
            return self.nodes.choose(self.rng)
        if target == "driver":
            return self.arena.pid
        return victims.choose(target, self.arena.mark, self.rng)

    def _replace(self, kill: Kill) -> None:
        if kill.target == "node":
            assert self.nodes is not None
            self.nodes.replace(kill.pid)
        if kill.target == "driver":
            assert self.arena.driver is not None
            self.arena.driver.wait()
            self.arena.submit()

    def _watch(self, kill: Kill, held: Counter[str]) -> None:
        """Note what follows a kill, unless the next one comes at once."""
        if self.rng.random() < self.rush:
            time.sleep(self.rng.uniform(0.0, _RUSH_S))
        else:
            _await_progress(self.arena, kill)
            kill.held = tuple(self.nodes.grown(held)) if self.nodes else ()
        kill.driver, kill.driver_mb = self.arena.pid, victims.own_mb(self.arena.pid)


def _await_progress(arena: Arena, kill: Kill) -> None:
    # What is left of the old workers may step on for a moment.
    restarts = kill.target in ("worker", "stopped", "coordinator", "controller", "driver")
    old = kill.known if restarts else frozenset()
    new = await_step(arena, after=kill.step, since=kill.at, old=old, timeout_s=_STEP_TIMEOUT_S)
    later = (s for s in arena.signs() if s.at > kill.at and s.pid not in kill.known)
    first = next(later, None)
    kill.first_s = first.at - kill.at if first else None
    kill.new_s = new.at - kill.at if new else None


def _await_save(arena: Arena) -> Path | None:
    """Return a checkpoint's folder that is being written, or None where none is in time."""
    # Until the next start deletes it, what an earlier kill left half written lies there, too.
    old = _half_written(arena)
    deadline = time.monotonic() + _SAVE_TIMEOUT_S
    while time.monotonic() < deadline:
        now = _half_written(arena)
        if now - old:
            return max(now - old)
        old &= now
        time.sleep(0.001)
    return None


def _half_written(arena: Arena) -> set[Path]:
    folders = (Path(arena.run) / "checkpoints").glob("step-*")
    return {folder for folder in folders if not (folder / MANIFEST_FILE).exists()}
