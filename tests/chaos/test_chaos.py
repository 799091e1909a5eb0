"""A small chaos: all that a run consists of is killed, with the driver's own cluster or without."""

import contextlib
import datetime
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group

from chaos import checks
from chaos.arena import HANG_TIMEOUT_S, Arena, await_end, write_data
from chaos.battle import Battle
from chaos.nodes import Nodes, nodes_for
from orchestrator.run import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SEED = 7
# Ray asks each worker twice a second, and gives a killed one some seconds to end.
POLLS_S = 20.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"), kills=3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: str) -> Iterator[Arena]:
    with contextlib.closing(Arena(tmp_path_factory.mktemp("calm"), data, pause_s=0.0)) as arena:
        arena.submit()
        assert await_end(arena, timeout_s=300) == 0, arena.log_tail()
        yield arena


def assert_as_if_nothing_had_been(arena: Arena, undisturbed: Arena, shm: set[str]) -> None:
    assert checks.leaks(arena, shm) == []
    assert checks.wrong_counts(arena) == []
    assert checks.differing_weights(arena, undisturbed) == []


def test_a_run_whose_driver_is_killed_with_its_cluster_ends_as_if_nothing_had_been(
    tmp_path: Path, data: str, undisturbed: Arena
) -> None:
    shm, targets = checks.shared_memory(), ["loader", "worker", "driver"]
    with contextlib.closing(Arena(tmp_path, data, pause_s=0.1)) as arena:
        kills = Battle(arena=arena, rng=random.Random(SEED), say=print).fight(targets)
        assert [kill.target for kill in kills] == targets
        assert arena.starts == 2
        assert checks.failures(arena)["process"] >= 1
        assert checks.failures(arena)["code"] == 0
        assert_as_if_nothing_had_been(arena, undisturbed, shm)


def test_a_run_that_is_killed_while_it_saves_leaves_nothing_in_its_cluster(
    tmp_path: Path, data: str, undisturbed: Arena
) -> None:
    shm, targets = checks.shared_memory(), ["controller", "stopped", "worker"]
    with contextlib.closing(Arena(tmp_path, data, pause_s=0.1)) as arena:
        with nodes_for(arena) as nodes:
            rng = random.Random(SEED)
            battle = Battle(arena=arena, rng=rng, say=print, nodes=nodes, saves=1.0)
            kills = battle.fight(targets)
            assert [kill.target for kill in kills] == targets
            assert any(kill.moment == "save" for kill in kills)
            assert all(kill.new_s for kill in kills)
            assert not any(kill.held for kill in kills)
            assert nodes.left_over() == []
            assert_left_over_is_found(nodes)
        stopped = kills[1].at
        assert HANG_TIMEOUT_S / 2 < noticed(arena) - stopped < HANG_TIMEOUT_S + POLLS_S
        assert checks.failures(arena)["controller"] == 1
        assert_as_if_nothing_had_been(arena, undisturbed, shm)


def noticed(arena: Arena) -> float:
    """Return when the one worker that hung was written down, in seconds since 1970."""
    [hang] = [event for event in read_events(arena.run) if event.get("cause") == "hang"]
    return datetime.datetime.fromisoformat(hang["time"]).timestamp()


def assert_left_over_is_found(nodes: Nodes) -> None:
    planted = ray.remote(num_cpus=0)(Planted).remote()
    group = placement_group([{"CPU": 1}])
    kept = ray.put(bytes(10**6))
    ray.get([planted.__ray_ready__.remote(), group.ready()])
    *held, stored = nodes.left_over(patience_s=0.0)
    assert held == ["1 more actor Planted", "1 more placement group"]
    assert re.fullmatch(r"1000\d{3} bytes pinned in shared memory", stored), kept
    assert nodes.forgotten() < 10**6


class Planted:
    """An actor that nobody ends."""
