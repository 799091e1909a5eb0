"""How many workers find a place, what config says about it, and how a change is told. No Ray."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from packed import write_packed

from orchestrator import plan
from orchestrator.config import Config, DataConfig, ScalingConfig, UserError
from orchestrator.configfile import from_dict, load
from orchestrator.overrides import to_dict
from orchestrator.run import append_event
from orchestrator.train import preflight
from orchestrator.train.loop.elastic_pause import resized_event
from orchestrator.train.preflight import Resources
from orchestrator.train.recovery.elastic import Group, fewer, room

NODES = {"head": {"memory": 1e9}, "a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 3.0, "GPU": 2.0}}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"num_workers": (1, 100)}, 7),
        ({"num_workers": (1, 5)}, 5),
        ({"num_workers": (1, 100), "cpus_per_worker": 2}, 3),  # not 3.5: a node each
        ({"num_workers": (1, 100), "cpus_per_worker": 0.1}, 70),
        ({"num_workers": (1, 100), "gpus_per_worker": 1}, 3),
        ({"num_workers": (1, 100), "cpus_per_worker": 5}, 0),
    ],
)
def test_workers_are_counted_node_by_node(scaling: dict[str, Any], expected: int) -> None:
    assert room(NODES, [], ScalingConfig(**scaling)) == expected


def test_what_other_placement_groups_hold_is_not_free() -> None:
    scaling = ScalingConfig(num_workers=(1, 100))
    own = Group("own", (("a", {"CPU": 1.0}), ("b", {"CPU": 1.0})))
    other = Group("other", (("a", {"CPU": 3.0}), ("gone", {"CPU": 1.0})))
    assert room(NODES, [own, other], scaling, own="own") == 4
    assert room(NODES, [own, other], scaling) == 2
    assert room(NODES, [Group("greedy", (("b", {"CPU": 9.0}),))], scaling) == 4


def test_workers_that_find_no_place_are_tried_one_less_each_time() -> None:
    scaling = ScalingConfig(num_workers=(2, 5))
    assert fewer(5, None, scaling) == 5
    assert fewer(5, 5, scaling) == 4
    assert fewer(3, 5, scaling) == 3  # a node went meanwhile
    assert fewer(5, 2, scaling) == 2


def elastic(low: int, high: int, **data: Any) -> Config:
    return Config(
        name="run",
        data=DataConfig(index="somewhere", **data),
        scaling=ScalingConfig(num_workers=(low, high)),
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (elastic(3, 2), r"scaling\.num_workers=\[3, 2\] must ascend: .*; swap them"),
        (elastic(0, 2), r"scaling\.num_workers=0 must be at least 1"),
        (elastic(1, 9, global_batch=8), r"data\.global_batch=8 must be at least .*=9"),
    ],
)
def test_ends_that_cannot_work_are_refused_before_anything(config: Config, words: str) -> None:
    with pytest.raises(UserError, match=words):
        preflight.check_config(config)


def test_the_ends_survive_yaml() -> None:
    config = load(None, ["--scaling.num_workers", "[1, 3]"])
    assert config.scaling.num_workers == (1, 3)
    assert (config.scaling.min_workers, config.scaling.max_workers) == (1, 3)
    assert from_dict(to_dict(config)) == config
    for wrong in ("[1, 2, 3]", "two", "[1, x]"):
        with pytest.raises(UserError, match=r"'scaling\.num_workers'.*\[2, 8\]; change it"):
            load(None, ["--scaling.num_workers", wrong])


def test_only_the_fewest_workers_must_fit_the_cluster() -> None:
    found = Resources(cpus=4, gpus=0, nodes=({"CPU": 2.0}, {"CPU": 2.0}))
    preflight.check_resources(elastic(4, 9), found, may_grow=False)
    with pytest.raises(UserError, match=r"num_workers=5 needs 5 CPUs but this cluster has 4"):
        preflight.check_resources(elastic(5, 9), found, may_grow=False)
    wide = dataclasses.replace(elastic(1, 2).scaling, cpus_per_worker=3)
    config = dataclasses.replace(elastic(1, 2), scaling=wide)
    with pytest.raises(UserError, match=r"scaling\.cpus_per_worker=3: .* hold 0 workers.*largest"):
        preflight.check_resources(config, found, may_grow=False)
    preflight.check_resources(config, found, may_grow=True)


def test_plan_shows_both_ends(tmp_path: Path) -> None:
    index = write_packed(tmp_path, train=90, val=11)
    config = dataclasses.replace(
        elastic(3, 5, global_batch=30), data=DataConfig(index=index.uri, global_batch=30)
    )
    page = plan.describe(config)
    assert "3 (this run, at least)" in page
    assert "5 (this run, at most)" in page
    assert "on 3 workers" in page
    assert "made at a notice of 30 s fits it where the workers together write" in page
    config = dataclasses.replace(config, storage_path=str(tmp_path))
    (tmp_path / "run").mkdir()
    append_event(str(tmp_path / "run"), "slow_save", save_s=42.5, every_steps=170, is_lowered=True)
    page = plan.describe(config)
    assert "took 42.5 s" in page
    assert "will not fit in 30 s; periodic interval lowered to 170 steps" in page


def start(workers: int, step: int = 0) -> dict[str, Any]:
    return {"event": "training", "workers": workers, "step": step}


@pytest.mark.parametrize(
    ("between", "before", "now", "reason"),
    [
        (["failure"], 3, 2, "workers were lost"),
        (["preempted"], 3, 2, "nodes were preempted"),
        ([], 2, 4, "more nodes are there"),
        (["preempted"], 2, 3, "more nodes are there"),
        (["failed", "submitted"], 2, 1, "submitted again"),
    ],
)
def test_a_change_of_workers_is_told_with_its_reason(
    between: list[str], before: int, now: int, reason: str
) -> None:
    events = [start(9), {"event": "preempted"}, start(before)]
    events += [{"event": kind} for kind in between] + [start(now, 7)]
    assert resized_event(events) == {"from": before, "to": now, "reason": reason, "step": 7}
    assert resized_event([start(2), *events[3:-1], start(2)]) is None
    assert resized_event([start(2)]) is None
