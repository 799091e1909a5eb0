"""How many steps are measured from memory, and when."""

import types
from typing import Any

import pytest

from orchestrator.data.plan import Batching
from orchestrator.train.timing.ceiling import WARM_UP, Ceiling, steps_to_hold
from orchestrator.train.timing.timeline import PARTS


def batching(steps: int, *, samples: int = 64, workers: int = 2) -> Batching:
    return Batching(steps * samples, samples, workers, accumulation=1)


@pytest.mark.parametrize(
    ("steps", "first", "expected"),
    [(100, 0, 0), (519, 0, 0), (520, 0, 5), (1_500, 0, 10), (90_000, 0, 15), (1_000, 700, 0)],
)
def test_a_hundredth_of_the_steps_that_are_left_is_held(
    steps: int, first: int, expected: int
) -> None:
    held = steps_to_hold(batching(steps), step=first, image_size=32)
    assert held == expected
    assert held <= max(0, steps - first - WARM_UP) / 100


def test_what_is_held_fits_into_memory() -> None:
    def count(samples: int) -> int:
        return steps_to_hold(batching(90_000, samples=samples), step=0, image_size=224)

    assert count(256) == 10  # 128 images of 150 kB on each worker
    assert count(4_096) == 0  # less than five steps fit


def measure(*, shares_cpus: bool, stop: int = 1_500) -> tuple[Ceiling, list[int]]:
    """Train 1,500 steps of 10 ms that wait 30 ms more, unless they are fed from memory.

    Where readers share the workers' CPUs, a step takes 20 ms more as long as there is a reader.

    Returns:
        the measurement, and the step after which memory was filled, if it was.
    """
    held: list[int] = []
    loader: Any = types.SimpleNamespace(
        batching=batching(1_500), image_size=32, shares_cpus=shares_cpus,
        hold=lambda steps: held.append(step),
    )  # fmt: skip
    ceiling = Ceiling(loader, step=0)
    seconds = dict.fromkeys(PARTS, 0.0)
    for step in range(1, stop + 1):
        from_memory = bool(held) and step <= held[0] + 10
        at_end = from_memory and held[0] + 10 == 1_500
        seconds["forward_backward"] += 0.008 + 0.02 * (shares_cpus and not at_end)
        seconds["communication"] += 0.002
        seconds["wait"] += 0.0 if from_memory else 0.03
        if ceiling.is_due(step):
            ceiling.look(step, lambda: dict(seconds))
    return ceiling, held


@pytest.mark.parametrize(("shares_cpus", "after"), [(False, WARM_UP), (True, 1_490)])
def test_what_a_step_takes_from_memory(shares_cpus: bool, after: int) -> None:
    ceiling, held = measure(shares_cpus=shares_cpus)
    assert held == [after]
    assert ceiling.own_s == pytest.approx(0.008)
    assert ceiling.exchange_s == pytest.approx(0.002)


def test_a_run_that_stops_early_has_no_ceiling_where_readers_share_cpus() -> None:
    ceiling, held = measure(shares_cpus=True, stop=1_400)
    assert (ceiling.own_s, held) == (None, [])
