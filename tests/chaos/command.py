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
from chaos.arena import MARK, Arena, await_end, write_data
from chaos.battle import Kill, fight
from chaos.nodes import Nodes

_NODES = 3


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
    say(f"seed {seed}: {args.kills} kills of {', '.join(targets)}")
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
        help=f"of {','.join(victims.TARGETS)}; stopped is a worker with SIGSTOP; node needs a "
        "cluster of several nodes, which is started",
    )
    parser.add_argument("--data", help="packed data to train on; default: random images")
    parser.add_argument("--folder", type=Path, help="keep everything here; default: temporary")
    parser.add_argument(
        "--rush", type=float, default=0.3, help="share of kills that hit a run still starting again"
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
    shm = checks.shared_memory()
    arena = Arena(folder / "killed", data, pause_s=args.pause)
    nodes = Nodes(MARK, arena.mark, num_nodes=_NODES) if "node" in targets else None
    arena.address = nodes.address if nodes else ""
    deadline = time.monotonic() + 60 * args.minutes
    wrong: list[str] = []
    rng = random.Random(seed)
    try:
        kills = fight(
            arena,
            targets=[rng.choice(targets) for _ in range(args.kills)],
            rng=rng,
            say=say,
            nodes=nodes,
            deadline=deadline,
            rush=args.rush,
        )
        wrong += nodes.left_over() if nodes else []
    finally:
        arena.end()
        if nodes:
            nodes.stop()
    wrong += checks.leaks(arena, shm)
    undisturbed = Arena(folder / "undisturbed", data, pause_s=0.0)
    undisturbed.calm()
    undisturbed.submit()
    await_end(undisturbed, timeout_s=300)
    undisturbed.end()
    wrong += checks.wrong_counts(arena) + checks.differing_weights(arena, undisturbed)
    _summarize(arena, kills, wrong, args.kills)
    return 1 if wrong else 0


def _summarize(arena: Arena, kills: list[Kill], wrong: list[str], asked: int) -> None:
    say(f"{len(kills)} of {asked} kills; the driver was submitted {arena.starts} times")
    causes = ", ".join(f"{name} {n}" for name, n in sorted(checks.failures(arena).items()))
    say(f"failures written down: {causes or 'none'}")
    for target in sorted({kill.target for kill in kills}):
        seconds = [k.new_s for k in kills if k.target == target and k.new_s is not None]
        if seconds:
            worst, middle = max(seconds), statistics.median(seconds)
            say(f"{target}: next new step after {middle:.1f} s (median), {worst:.1f} s at worst")
    for sentence in wrong:
        say(f"WRONG: {sentence}")
    if not wrong:
        say(
            "every id exactly once per epoch; final weights bit-equal to the undisturbed run's; no "
            "process, shared memory, temporary folder or lease left behind"
        )
