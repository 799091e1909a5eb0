"""Keyed random numbers: the same for ever, even, and exact where they are Beta's."""

import numpy as np
import pytest
from scipy import stats

from orchestrator.data.augmentation.draws import Draws, symmetric_beta


def draws(count: int, *, seed: int = 0, epoch: int = 0) -> Draws:
    return Draws(seed, epochs=[epoch] * count, ids=[str(i) for i in range(count)])


def test_a_key_gives_the_same_numbers_for_ever() -> None:
    # Written down once: another NumPy, machine or version of ours must not change a run.
    assert Draws(3, epochs=[0, 7], ids=["a", "b/c.png"]).words("x", 2).tolist() == [
        [7308349805123792063, 4450776205518823792],
        [6341825766000802852, 7768500624301471496],
    ]


def test_numbers_depend_on_the_sample_alone() -> None:
    whole = draws(50).uniforms("x", 3)
    assert np.array_equal(Draws(0, epochs=[0], ids=["17"]).uniforms("x", 3)[0], whole[17])
    for other in (
        draws(50, seed=1).uniforms("x", 3),
        draws(50, epoch=1).uniforms("x", 3),
        draws(50).uniforms("y", 3),
    ):
        assert not np.isin(other, whole).any()


def test_numbers_are_even_and_independent() -> None:
    found = draws(20_000).uniforms("x", 4)
    assert all(stats.kstest(column, "uniform").pvalue > 1e-3 for column in found.T)
    assert np.abs(np.corrcoef(found.T) - np.eye(4)).max() < 0.03
    other = draws(20_000, epoch=1).uniforms("x", 4)
    assert abs(np.corrcoef(found[:, 0], other[:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.5, 0.8, 1.0, 1.7, 4.0, 30.0])
def test_beta_is_exact(alpha: float) -> None:
    found = symmetric_beta(alpha, draws(20_000).uniforms("beta", 2))
    assert 0 <= found.min() <= found.max() <= 1
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert found.mean() == pytest.approx(0.5, abs=0.015)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_beta_has_no_holes_at_the_ends_of_its_uniforms() -> None:
    ends = np.array([[0.0, 0.3], [1 - 2**-53, 0.0], [1 - 2**-53, 0.5], [2**-53, 0.25]])
    assert np.isfinite(symmetric_beta(0.001, ends)).all()
    assert symmetric_beta(1.0, ends)[0] == 0.5
