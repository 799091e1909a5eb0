"""`python -m tests.chaos`: kills, then checks; what it prints says whether all promises held."""

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from chaos import checks, victims
from chaos.arena import WORKERS, Arena, await_end, write_data
from chaos.battle import Battle, Kill
from chaos.nodes import nodes_for

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def say(line: str) -> None:
    """Show a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chaos that the arguments ask for; return 0 where all held."""
    args = _parser().parse_args(argv)
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    targets = args.targets.split(",")
    unknown = sorted(set(targets) - set(victims.TARGETS))
    if unknown:
        say(f"--targets: {unknown[0]!r} is none of {', '.join(victims.TARGETS)}")
        return 2
    what = f"{args.strategy} on {args.workers} workers"
    say(f"seed {seed}: {args.kills} kills of {', '.join(targets)}; {what}")
    with _folder(args.folder) as folder:
        data = args.data or write_data(folder / "data", kills=args.kills)
        return _run(folder, data, targets, seed, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="choose the same targets and pauses again")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument(
        "--targets",
        default="worker,loader,controller,driver",
        help=f"of {','.join(victims.TARGETS)}; stopped is a worker with SIGSTOP; a driver that is "
        f"killed says nothing about memory: {checks.JUDGED_KILLS} kills of others do",
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--data", help="packed data to train on; default: random images")
    parser.add_argument("--folder", type=Path, help="keep everything here; default: temporary")
    parser.add_argument(
        "--rush",
        type=float,
        default=0.3,
        help="share of kills that hit a run still starting again; readers alone, killed so, may "
        "end it, as the same failure three times at one step does",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="no further kill after these")
    parser.add_argument("--pause", type=float, default=0.15, help="seconds that a step is held up")
    return parser


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _run(folder: Path, data: str, targets: list[str], seed: int, args: argparse.Namespace) -> int:
    rng = random.Random(seed)
    shm = checks.shared_memory()
    how = {"strategy": args.strategy, "workers": args.workers}
    with contextlib.closing(Arena(folder / "killed", data, pause_s=args.pause, **how)) as arena:
        with nodes_for(arena, lose="node" in targets) as nodes:
            battle = Battle(
                arena=arena,
                rng=rng,
                say=say,
                nodes=nodes,
                deadline=time.monotonic() + 60 * args.minutes,
                rush=args.rush,
            )
            kills = battle.fight([rng.choice(targets) for _ in range(args.kills)])
            wrong = [
                f"after kill {k.number} ({k.target}): {more}" for k in kills for more in k.held
            ]
            wrong += nodes.left_over()
            forgotten = nodes.forgotten()
        wrong += checks.leaks(arena, shm) + checks.grown_drivers(kills)
    with contextlib.closing(Arena(folder / "undisturbed", data, pause_s=0.0, **how)) as undisturbed:
        wrong += _train(undisturbed)
    wrong += checks.wrong_counts(arena) + checks.differing_weights(arena, undisturbed)
    _summarize(arena, kills, wrong, args.kills)
    say(f"object stores: {forgotten} bytes that nobody refers to")
    return 1 if wrong else 0


def _train(undisturbed: Arena) -> list[str]:
    """Train without kills; return a sentence where that fails."""
    undisturbed.calm()
    undisturbed.submit()
    code = await_end(undisturbed, timeout_s=300)
    return [f"the undisturbed run ended with {code}:\n{undisturbed.log_tail()}"] if code else []


def _summarize(arena: Arena, kills: list[Kill], wrong: list[str], asked: int) -> None:
    saves = sum(kill.moment == "save" for kill in kills)
    say(
        f"{len(kills)} of {asked} kills, {saves} of them during a save; the driver was submitted "
        f"{arena.starts} times"
    )
    causes = ", ".join(f"{name} {n}" for name, n in sorted(checks.failures(arena).items()))
    say(f"failures written down: {causes or 'none'}")
    for target in sorted({kill.target for kill in kills}):
        seconds = [k.new_s for k in kills if k.target == target and k.new_s is not None]
        if seconds:
            worst, middle = max(seconds), statistics.median(seconds)
            say(f"{target}: next new step after {middle:.1f} s (median), {worst:.1f} s at worst")
    lives = checks.lives(kills)
    for life in lives:
        say(f"driver: {life}")
    if not lives:
        say(f"driver: no memory compared, since none lived through {checks.JUDGED_KILLS} kills")
    for sentence in wrong:
        say(f"WRONG: {sentence}")
    if not wrong:
        say(
            "every id exactly once per epoch; final weights bit-equal to the undisturbed run's; no "
            "process, actor, placement group, shared memory, temporary file or lease left behind"
        )
