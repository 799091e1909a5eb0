"""Steps -> positions and epochs."""

import pytest

from orchestrator.data.plan import Batching
from orchestrator.train.place import Place


@pytest.mark.parametrize(
    ("samples", "step_samples", "epochs"), [(75, 13, 3), (10, 10, 2), (9, 4, 5)]
)
def test_every_step_is_in_one_epoch_and_each_epoch_ends_once(
    samples: int, step_samples: int, epochs: int
) -> None:
    batching = Batching(total=samples * epochs, step_samples=step_samples, num_workers=1,
                        accumulation=1)  # fmt: skip
    place = Place(batching, samples)
    ends = [step for step in range(1, batching.num_steps + 1) if place.ends_epoch(step)]
    assert len(ends) == epochs
    assert ends == [-(-samples * epoch // step_samples) for epoch in range(1, epochs + 1)]
    step = 0
    for end in ends:
        assert place.steps_left_in_epoch(step) == end - step
        step = end
    assert place.position(step) == samples * epochs
    assert place.epoch(step) == epochs
