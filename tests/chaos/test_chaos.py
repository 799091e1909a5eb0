"""A small chaos: a reader, a worker, the controller and the driver of one run are killed."""

import random
from pathlib import Path

import pytest

from chaos import checks
from chaos.arena import Arena, await_end, write_data
from chaos.battle import fight

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SEED = 7


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", kills=4)
    shm = checks.shared_memory()
    arena = Arena(tmp_path / "killed", data, pause_s=0.1)
    lines: list[str] = []
    try:
        kills = fight(
            arena,
            targets=["loader", "worker", "controller", "driver"],
            rng=random.Random(SEED),
            say=lines.append,
        )
    finally:
        arena.end()
    assert [kill.target for kill in kills] == ["loader", "worker", "controller", "driver"], lines
    assert checks.leaks(arena, shm) == []
    assert checks.wrong_counts(arena) == []
    causes = checks.failures(arena)
    assert causes["process"] >= 1
    assert causes["controller"] == 1
    assert causes["code"] == 0
    undisturbed = Arena(tmp_path / "undisturbed", data, pause_s=0.0)
    undisturbed.submit()
    code = await_end(undisturbed, timeout_s=300)
    undisturbed.end()
    assert code == 0, undisturbed.log_tail()
    assert checks.differing_weights(arena, undisturbed) == []
