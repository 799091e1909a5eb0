"""How many steps are measured from memory."""

import pytest

from orchestrator.data.plan import Batching
from orchestrator.train.timing.ceiling import WARM_UP, steps_to_hold


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
