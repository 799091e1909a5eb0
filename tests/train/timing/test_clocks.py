"""Runs in bare processes with one thing made slow: the parts add up, and the verdict names it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bare
import pytest
from bare import Start
from conftest import encode_png
from faults import Faults, serve_faults
from packed import write_packed
from s3 import S3Server
from slow_modules import DELAY_S

from orchestrator import storage
from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
)
from orchestrator.data.index import Index
from orchestrator.run import append_event, read_events
from orchestrator.train.account import account
from orchestrator.train.saving import checkpoint
from orchestrator.train.timing.timeline import PARTS, moment_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SAMPLES, BATCH = 320, 8
STEPS = SAMPLES // BATCH
# Name -> how its config differs, and what must be said of it.
SLOW: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({}, "compute-bound: "),
    "worker": ({}, "slow worker: worker 1 computes "),
    "exchange": ({}, "communication-bound: "),
    "collectives": ({"strategy": "zero2"}, "communication-bound: "),
    "gather": ({"strategy": "zero3"}, "communication-bound: "),
    "scatter": ({"strategy": "zero3"}, "communication-bound: "),
    "optimizer": ({}, "optimizer-bound: "),
    "checkpoint": ({"checkpoint": CheckpointConfig(every_steps=1)}, "checkpoint-bound: "),
    "validation": ({}, "validation-bound: "),
}


def make_config(
    index: Index | str, run: Path, slow: str = "", *, epochs: int = 1, **train: Any
) -> Config:
    uri = index if isinstance(index, str) else index.uri
    return Config(
        name=run.name,
        storage_path=str(run.parent),
        data=DataConfig(index=uri, global_batch=BATCH, image_size=8, window_chunks=2),
        model=ModelConfig(class_path="slow_modules.Slow", init_args={"slow": slow}),
        train=TrainConfig(
            **{
                "max_epochs": epochs,
                "precision": "32",
                "strategy": "ddp",
                "checkpoint": CheckpointConfig(every_seconds=None),
                "early_stopping": None,
                **train,
            }
        ),
        scaling=ScalingConfig(num_workers=2),
    )


def submit(config: Config, **changes: Any) -> Start:
    run = Path(config.storage_path, config.name)
    run.mkdir(exist_ok=True)
    append_event(str(run), "submitted", cpus=3.0)
    append_event(str(run), "decided", slots=1, accumulation=1)
    return Start(run=str(run), config=config, **changes)


def accounted(start: Start) -> dict[str, Any]:
    events = read_events(start.run)
    last = checkpoint.list_manifests(start.run)[-1]
    return account(events, last, start.config, now=moment_of(events[-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clocks")


@pytest.fixture(scope="module")
def quick(folder: Path) -> Index:
    """Return a data set whose images cost nothing to decode."""
    return write_packed(folder / "quick", train=SAMPLES, val=8)


@pytest.fixture(scope="module")
def far(s3: S3Server, quick: Index) -> Iterator[dict[str, str]]:
    """Put the data set into a bucket that is far away; yield what a worker must know of it."""
    s3.make_bucket("far")
    for path in sorted(Path(quick.uri).rglob("*")):
        if path.is_file():
            storage.upload(path, f"s3://far/{path.relative_to(quick.uri)}")
    with serve_faults(s3) as proxy:
        proxy.faults = Faults(delay_s=DELAY_S)
        yield proxy.env


@pytest.fixture(scope="module")
def starts(folder: Path, quick: Index, far: dict[str, str]) -> dict[str, Start]:
    """Run all trials, in two processes and in one session of them."""
    large = {f"train-{i:04d}": encode_png(i, side=300) for i in range(SAMPLES)}
    hard = write_packed(folder / "hard", train=SAMPLES, val=8, broken=large)
    configs = {
        slow: make_config(quick, folder / slow, slow, **changes)
        for slow, (changes, _) in SLOW.items()
    }
    configs["decode"] = make_config(hard, folder / "decode", epochs=14)
    configs["free"] = make_config(quick, folder / "free", epochs=14)
    found = {name: submit(config) for name, config in configs.items()}
    found["storage"] = submit(make_config("s3://far", folder / "storage"), env=far)
    killed = make_config(
        quick, folder / "killed", "model", checkpoint=CheckpointConfig(every_steps=10)
    )
    first = submit(killed, stop_after=STEPS - 1)
    # A process's first validation takes a while, which would be a sixth of the first trial's time.
    warm_up = submit(make_config(quick, folder / "warm-up"))
    bare.train(2, warm_up, *found.values(), first, dataclasses.replace(first, stop_after=None))
    return {**found, "killed": first}


@pytest.mark.parametrize("slow", SLOW)
def test_what_is_slow_is_named(starts: dict[str, Start], slow: str) -> None:
    found = accounted(starts[slow])
    assert found["verdict"].startswith(SLOW[slow][1])
    assert ("\n" in found["verdict"], found["verdict"].endswith(".")) == (False, True)


@pytest.mark.parametrize("name", [*SLOW, "decode", "storage", "killed"])
def test_the_parts_add_up_to_the_time_since_the_first_allocation(
    starts: dict[str, Start], name: str
) -> None:
    found = accounted(starts[name])
    assert set(found["time"]) == set(PARTS)
    assert min(found["time"].values()) >= 0
    # Workers get their first batch at slightly different times; the mean of them is reported.
    assert abs(found["unattributed_s"]) < 0.4 + 0.02 * found["allocated_s"]
    assert 0 < found["ettr"] < 1


def test_slow_parts_are_measured(starts: dict[str, Start]) -> None:
    least = STEPS * DELAY_S
    times = {slow: accounted(starts[slow])["time"] for slow in SLOW}
    assert times["model"]["forward_backward"] >= least
    assert times["worker"]["forward_backward"] >= least  # the mean of 2 * least and nothing
    assert times["worker"]["communication"] >= 0.8 * least  # the other waits for it
    assert times["exchange"]["communication"] >= 0.9 * least  # the last step's is not known
    for slow in ("collectives", "gather", "scatter"):
        assert times[slow]["communication"] >= least
    assert times["optimizer"]["optimizer"] >= least
    assert times["checkpoint"]["checkpoint"] >= least
    assert times["validation"]["validation"] >= 25 * DELAY_S


def test_slow_decoding_and_slow_storage_are_told_apart(starts: dict[str, Start]) -> None:
    decode, far = accounted(starts["decode"])["verdict"], accounted(starts["storage"])["verdict"]
    assert decode.startswith("input-bound: ")
    assert "decoding is slow" in decode
    assert far.startswith("input-bound: ")
    assert "storage is slow: raise data.decode_slots from 1 to" in far


def test_the_ceiling_is_what_the_run_does_with_data_for_free(starts: dict[str, Start]) -> None:
    def step_s(name: str) -> float:
        events = read_events(starts[name].run)
        stats = next(e["stats"] for e in events if e["event"] == "trained")
        return float(stats["step_s"] - stats["wait_s_of_step"])

    stats = checkpoint.list_manifests(starts["decode"].run)[-1].stats
    assert stats["ceiling_s"] < 0.7 * stats["step_s"]
    # A few steps of some ms, on a machine that does other things, too.
    assert step_s("free") / 2 < stats["ceiling_s"] < step_s("free") * 2


def test_steps_that_are_done_again_count_as_lost(starts: dict[str, Start]) -> None:
    killed, undisturbed = accounted(starts["killed"]), accounted(starts["model"])
    # 9 steps after the last checkpoint of the first start were lost.
    assert killed["time"]["restart"] > 9 * DELAY_S
    ours, theirs = (each["time"]["forward_backward"] for each in (killed, undisturbed))
    assert ours == pytest.approx(theirs, rel=0.5)
    assert killed["ettr"] < undisturbed["ettr"]
