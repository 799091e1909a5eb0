"""What holds a run back: from numbers to one sentence."""

import dataclasses
import re
from typing import Any

import pytest

from orchestrator.config import (
    BesideConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ScalingConfig,
    TrainConfig,
    ValidateConfig,
)
from orchestrator.train.timing.measured import Measured
from orchestrator.train.timing.timeline import PARTS
from orchestrator.train.timing.verdict import judge

STEADY = {"forward_backward": 90.0, "startup": 10.0}
READING = {"decode_s": 180.0, "read_s": 20.0, "requests": 1_000.0, "retries": 0.0}


def measured(seconds: dict[str, float], **changes: Any) -> Measured:
    stats = {**READING, **changes.pop("stats", {})}
    base = Measured(
        seconds={**dict.fromkeys(PARTS, 0.0), **seconds}, stats=stats, strategy="ddp", workers=4,
        accumulation=1, epochs=1, restarts=0, slots=2, spare_cpus=6.0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def say(m: Measured, **train: Any) -> str:
    return judge(m, Config(train=TrainConfig(**train))).sentence


WAITING = {"wait": 38.0, "forward_backward": 62.0}
FOUND = {"step_s": 1.0, "wait_s_of_step": 0.38, "exchange_s": 0.0, "ceiling_s": 0.625}


def test_slow_decoding_asks_for_slots() -> None:
    assert say(measured(WAITING, stats=FOUND)) == (
        "input-bound: 38 % of each step waits for data; with data for free this run would be 1.6x "
        "faster; decoding is slow: raise data.decode_slots from 2 to 4."
    )


def test_no_more_slots_than_there_are_cpus() -> None:
    assert "raise data.decode_slots from 2 to 3." in say(
        measured(WAITING, stats=FOUND, spare_cpus=3.5)
    )
    full = say(measured(WAITING, stats=FOUND, spare_cpus=2.0))
    assert "nothing in the config would help: decoding is slow and has all 2 CPUs" in full
    shared = say(measured(WAITING, stats=FOUND, spare_cpus=0.0))
    assert "shares the workers' CPUs, of which none is left; add nodes with CPUs" in shared


def test_slow_storage_asks_for_reads_at_once_unless_it_refuses() -> None:
    stats = {**FOUND, "read_s": 180.0, "decode_s": 20.0}
    assert say(measured(WAITING, stats=stats, spare_cpus=0.0)).endswith(
        "storage is slow: raise data.decode_slots from 2 to 4, so that more chunks are fetched at "
        "once."
    )
    refused = say(measured(WAITING, stats={**stats, "retries": 200.0}))
    assert "nothing in the config would help: storage is slow, and had 20 % of" in refused


def test_idle_readers_are_not_what_is_waited_for() -> None:
    sentence = say(measured(WAITING, stats={**FOUND, "decode_s": 10.0, "read_s": 5.0}))
    assert "readers are busy only 8 % of the time" in sentence


def test_reading_that_takes_the_workers_cpus_is_said_though_nothing_waits() -> None:
    stats = {**FOUND, "wait_s_of_step": 0.02}
    sentence = say(measured(STEADY, stats=stats, spare_cpus=0.0))
    assert sentence.startswith(
        "input-bound: reading takes 38 % of each step from the workers' CPUs; with data for free "
        "this run would be 1.6x faster; "
    )


def test_a_ceiling_that_was_not_measured_is_not_guessed() -> None:
    sentence = say(measured(WAITING))
    assert sentence.startswith("input-bound: 38 % of each step waits for data; how much faster")
    assert "was not measured; decoding is slow: raise" in sentence
    assert not re.search(r"\dx", sentence)


def test_readers_on_the_workers_cpus_are_not_nothing_where_no_ceiling_was_measured() -> None:
    # As where early stopping ended the run before its last steps.
    busy = {"decode_s": 162.0, "read_s": 0.0}  # of 2 readers in 90 s
    assert say(measured(STEADY, stats=busy, spare_cpus=0.0)).startswith(
        "input-bound: readers decode 90 % of the time on the workers' CPUs; how much faster it "
        "would be with data for free was not measured; nothing in the config would help: decoding "
        "is slow and shares the workers' CPUs, of which none is left"
    )
    assert say(measured(STEADY, stats=busy)).startswith("compute-bound")  # they have their own
    reads = {"decode_s": 18.0, "read_s": 170.0}
    assert say(measured(STEADY, stats=reads, spare_cpus=0.0)).startswith("compute-bound")


def test_the_worker_that_waits_longest_counts() -> None:
    # On average 20 % of a step, but one of two workers waits 38 % and the other for it.
    seconds = {"wait": 20.0, "forward_backward": 62.0, "communication": 18.0}
    assert say(measured(seconds, stats=FOUND)).startswith("input-bound: 38 % of each step")


COMMUNICATING = {"forward_backward": 55.0, "communication": 45.0}


@pytest.mark.parametrize(
    ("share", "changes", "remedy"),
    [
        (0.45, {}, "nothing in the config would help: a faster network"),
        (0.60, {}, "lower scaling.num_workers from 4 to 2."),
        (0.60, {"workers": 1}, "nothing in the config would help: a faster network"),
        (0.45, {"strategy": "zero3"}, "set train.strategy from zero3 to zero2, if"),
        (0.45, {"strategy": "zero2", "accumulation": 4}, "set train.strategy from zero2 to zero1"),
        (0.45, {"strategy": "zero2"}, "nothing in the config would help"),
    ],
)
def test_slow_collectives(share: float, changes: dict[str, Any], remedy: str) -> None:
    seconds = {"forward_backward": 100 * (1 - share), "communication": 100 * share}
    stats = {"step_s": 1.0, "exchange_s": share, "wait_s_of_step": 0.0}
    sentence = say(measured(seconds, stats=stats, **changes))
    spent = f"{100 * share:.0f} % of the time is spent on exchanging gradients; "
    assert sentence.startswith("communication-bound: " + spent + remedy)


def test_a_slow_worker_is_named() -> None:
    stats = {"step_s": 1.0, "exchange_s": 0.05, "slow_rank": 3.0, "slow_factor": 1.9}
    sentence = say(measured(COMMUNICATING, stats=stats))
    assert sentence.startswith(
        "slow worker: worker 3 computes 1.9x as long as the others, who wait for it 40 % of the "
        "time; nothing in the config would help: "
    )
    even = say(measured(COMMUNICATING, stats={**stats, "slow_factor": 1.1}))
    assert even.startswith("communication-bound: 45 %")  # waiting for each other by chance


@pytest.mark.parametrize(
    ("train", "changes", "remedy"),
    [
        ({"offload_optimizer": True}, {}, "set train.offload_optimizer from true to false"),
        ({}, {}, "set train.strategy from ddp to zero1"),
        ({}, {"workers": 1}, "nothing in the config would help"),
        ({}, {"strategy": "zero1"}, "nothing in the config would help"),
    ],
)
def test_slow_optimizer(train: dict[str, Any], changes: dict[str, Any], remedy: str) -> None:
    m = measured({"forward_backward": 70.0, "optimizer": 30.0}, **changes)
    lost = "optimizer-bound: 30 % of the time goes into the optimizer's steps; "
    assert say(m, **train).startswith(lost + remedy)


@pytest.mark.parametrize(
    ("settings", "epochs", "remedy"),
    [
        ({"every_steps": 10}, 1, "raise train.checkpoint.every_steps from 10 to 100."),
        ({"every_seconds": 20}, 1, "raise train.checkpoint.every_seconds from 20 to 200."),
        ({"every_seconds": 20}, 10, "nothing in the config would help: each epoch ends with one"),
        ({"every_seconds": None}, 1, "nothing in the config would help: each epoch ends with one"),
    ],
)
def test_slow_checkpoints(settings: dict[str, Any], epochs: int, remedy: str) -> None:
    m = measured({"forward_backward": 80.0, "checkpoint": 20.0}, epochs=epochs)
    sentence = say(m, checkpoint=CheckpointConfig(**settings))
    assert sentence.startswith(
        f"checkpoint-bound: steps pause 20 % of the time for checkpoints; {remedy}"
    )


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "set train.validate.beside from null to {cpus: 1}."),
        ({"every_samples": 100}, "set train.validate.beside from null to {cpus: 1}."),
        (
            {"every_samples": 100, "beside": BesideConfig()},
            "raise train.validate.every_samples from 100 to 1000.",
        ),
        ({"beside": BesideConfig()}, "nothing in the config would help: a smaller split"),
    ],
)
def test_slow_validation(settings: dict[str, Any], remedy: str) -> None:
    m = measured({"forward_backward": 60.0, "validation": 40.0})
    sentence = say(m, validate=ValidateConfig(**settings))
    lost = "validation-bound: 40 % of the time goes into validation, while training stands still; "
    assert sentence == lost + remedy or sentence.startswith(lost + remedy + " for")
    full = measured({"forward_backward": 60.0, "validation": 40.0}, spare_cpus=0.5)
    if settings == {}:  # preflight would refuse a process beside the workers
        assert say(full).endswith(
            "nothing in the config would help: a smaller split for validation would, or a CPU "
            "more, for train.validate.beside."
        )
    elif "beside" not in settings:
        assert say(full, validate=ValidateConfig(**settings)).endswith("from 100 to 1000.")


def test_restarts() -> None:
    seconds = {"forward_backward": 700.0, "restart": 300.0}
    sentence = say(measured(seconds, restarts=3))
    assert sentence == (
        "restart-bound: 30 % of the time went into 3 restarts and into steps that were done again; "
        "lower train.checkpoint.every_seconds from 600 to 30."
    )
    often = say(measured(seconds, restarts=30))
    assert "nothing in the config would help: events.jsonl says what failed" in often


def test_what_is_done_around_the_steps() -> None:
    seconds = {"forward_backward": 60.0, "other": 40.0}
    assert say(measured(seconds, accumulation=4)).endswith(
        "raise data.max_micro_batch from 64 to 256."
    )
    assert "nothing in the config would help" in say(measured(seconds))
    short = measured(seconds, accumulation=4, ran_out=True)
    assert "nothing in the config would help: more memory would" in say(short)


def test_where_nothing_waits_the_model_is_the_limit() -> None:
    free = {"step_s": 1.0, "wait_s_of_step": 0.0, "ceiling_s": 1.0}
    assert say(measured(STEADY, stats=free, spare_cpus=0.0)) == (
        "compute-bound: 100 % of the time is forward and backward, and nothing waits; nothing in "
        "the config would help: more or faster workers would."
    )
    assert say(measured(STEADY, spare_cpus=6.0)).endswith("raise scaling.num_workers from 4 to 8.")
    few = Config(data=DataConfig(global_batch=6))
    assert judge(measured(STEADY), few).sentence.endswith("num_workers from 4 to 6.")
    slightly = measured({"forward_backward": 91.0, "wait": 9.0})
    assert say(slightly).startswith("compute-bound: 91 %")


def test_an_exchange_that_is_not_measured_is_not_called_nothing() -> None:
    gpus = Config(scaling=ScalingConfig(num_workers=4, gpus_per_worker=1))
    hidden = "nothing waits but what they exchange, which is not told apart on GPUs under ZeRO; "
    assert hidden in judge(measured(STEADY, strategy="zero2"), gpus).sentence
    assert hidden not in judge(measured(STEADY, strategy="ddp"), gpus).sentence
    assert hidden not in judge(measured(STEADY, strategy="zero2"), Config()).sentence


def test_the_largest_loss_is_named() -> None:
    kinds = {
        "wait": "input-bound", "communication": "communication-bound",
        "optimizer": "optimizer-bound", "checkpoint": "checkpoint-bound",
        "validation": "validation-bound", "restart": "restart-bound", "other": "overhead-bound",
    }  # fmt: skip
    for part, kind in kinds.items():
        seconds = dict.fromkeys(kinds, 11.0) | {"forward_backward": 30.0, part: 14.0}
        verdict = judge(measured(seconds, restarts=1), Config())
        assert verdict.kind == kind
        assert verdict.share == pytest.approx(14 / 110)


def test_start_up_is_not_held_against_the_steps() -> None:
    assert say(measured({"forward_backward": 10.0, "startup": 90.0})).startswith("compute-bound")
