"""Sums over steps: the mean loss of all samples, and the share of bad images that stops a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.data.batch import MicroBatch
from orchestrator.train.tally import Tally

ALONE: Any = SimpleNamespace(world_size=1, strategy=SimpleNamespace(root_device="cpu"))


def images(good: int, *reasons: str) -> MicroBatch:
    return MicroBatch(
        micro=0,
        pixels=torch.empty(0),
        positions=[],
        epochs=[],
        labels=[],
        ids=["x"] * good,
        bad=[{"reason": reason} for reason in reasons],
    )


def test_the_loss_is_the_mean_over_samples_not_over_batches() -> None:
    tally = Tally(max_bad_fraction=0.01)
    tally.add_loss(torch.tensor(0.5), 3, accumulation=2)  # Lightning divided 1.0 by 2
    tally.add_loss(torch.tensor(2.0), 1, accumulation=2)
    tally.reduce(ALONE)
    assert tally.mean_loss == pytest.approx((3 * 1.0 + 1 * 4.0) / 4)
    tally.add_loss(torch.tensor(7.0), 2, accumulation=1)
    tally.reduce(ALONE)
    assert tally.mean_loss == pytest.approx(7.0)


def test_too_many_bad_images_are_said_with_their_reasons() -> None:
    tally = Tally(max_bad_fraction=0.01)
    tally.add_images(images(9_000, *["truncated: half"] * 80, "empty: no bytes"))
    assert tally.reduce(ALONE) is None  # 0.9 % of too few images to judge
    tally.add_images(images(1_000, *["truncated: half"] * 30, "not_an_image: <html>"))
    problem = tally.reduce(ALONE)
    assert problem is not None
    assert "112 of 10,112 images" in problem
    assert "truncated 110, empty 1, not_an_image 1" in problem
    assert "data.max_bad_fraction=0.01" in problem


@pytest.mark.parametrize(
    ("limit", "bad", "stops"), [(0.01, 100, False), (0.01, 101, True), (1, 9_000, False)]
)
def test_the_budget_is_inclusive(limit: float, bad: int, stops: bool) -> None:
    tally = Tally(max_bad_fraction=limit)
    tally.add_images(images(10_000 - bad, *["damaged"] * bad))
    assert (tally.reduce(ALONE) is not None) == stops
