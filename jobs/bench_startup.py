"""Seconds from `orchestrator train` to the first optimizer step, and from a kill to the next one.

    python jobs/bench_startup.py [--starts 5] [--kills 3] [--workers 1]

Each start is a new process on a new local Ray cluster, as a user's command is. The table is of the
event `startup` that every run writes, read from the run's folder. A kill is a SIGKILL of a train
worker some steps on; what counts is the time to the first step of the next start.
"""

import argparse
import datetime
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from findings import ORCHESTRATOR, say, spread
from photographs import write_photographs

from orchestrator.run import read_events

IMAGES = 512
LIMIT_S = 180.0


def command(root: Path, name: str, workers: int) -> list[str]:
    """Return the command of one run: as users type it, but for its entry point."""
    settings = {
        "name": name,
        "storage_path": str(root / "runs"),
        "data.index": str(root / "packed"),
        "data.global_batch": 64,
        "data.image_size": 112,
        "model.init_args.arch": "tiny_resnet",
        "train.max_epochs": 1_000,
        "train.early_stopping": "null",
        # Without progress between them, the third kill at one step would end the run.
        "train.checkpoint.every_steps": 1,
        "scaling.num_workers": workers,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [*ORCHESTRATOR, "train", *flags]


def wait_for_startup(run: Path, count: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Return the run's `count`-th startup event, as soon as it is written."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until and process.poll() is None:
        found = [event for event in read_events(str(run)) if event["event"] == "startup"]
        if len(found) >= count:
            return found[count - 1]
        time.sleep(0.05)
    raise SystemExit(f"{run} wrote no startup event in {LIMIT_S:g} s")


def kill_worker(process: subprocess.Popen[bytes]) -> float:
    """Kill one of this run's train workers; return when."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
            return time.time()
    raise SystemExit("no train worker was found")


def start_once(
    root: Path, name: str, workers: int, kills: int
) -> tuple[dict[str, Any], list[float]]:
    """Start a run, kill a worker of it some times, end it."""
    with (root / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command(root, name, workers), stdout=log, stderr=log)
    run, restarts = root / "runs" / name, []
    try:
        first = wait_for_startup(run, 1, process)
        for number in range(kills):
            time.sleep(3)
            killed = kill_worker(process)
            again = wait_for_startup(run, 2 + number, process)
            ended = datetime.datetime.fromisoformat(again["time"]).timestamp()
            restarts.append(ended - killed)
            say(f"{name}: {restarts[-1]:.1f} s from the kill to the next step: {again['seconds']}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    say(f"{name}: {first['total_s']:.1f} s to the first step: {first['seconds']}")
    return first, restarts


def report(starts: list[dict[str, Any]], restarts: list[float], workers: int) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield (
        f"{len(starts)} starts with {workers} worker(s) on {os.cpu_count()} CPUs "
        f"({platform.machine()}), {datetime.date.today().isoformat()}. Median and spread, seconds."
    )
    yield ""
    yield "| phase | s |"
    yield "|---|---|"
    for phase in starts[0]["seconds"]:
        yield f"| {phase} | {spread([start['seconds'].get(phase, 0.0) for start in starts], 1)} |"
    yield f"| **to the first step** | {spread([start['total_s'] for start in starts], 1)} |"
    if restarts:
        yield f"| **kill of a worker to the next step** | {spread(restarts, 1)} |"


def main(flags: list[str]) -> int:
    """Make the data, start and kill, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--starts", type=int, default=5, help="starts that count, after one more")
    parser.add_argument("--kills", type=int, default=3, help="kills in the last of them")
    parser.add_argument("--workers", type=int, default=1, help="train workers")
    options = parser.parse_args(flags)
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder:
        root = Path(folder)
        write_photographs(root / "photographs", IMAGES)
        source, out = str(root / "photographs"), str(root / "packed")
        subprocess.run(
            [*ORCHESTRATOR, "pack", "--source", source, "--out", out],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        starts, restarts = [], []
        for number in range(options.starts + 1):
            kills = options.kills if number == options.starts else 0
            found, again = start_once(root, f"start-{number}", options.workers, kills)
            starts.append(found)
            restarts += again
    for line in report(starts[1:], restarts, options.workers):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
