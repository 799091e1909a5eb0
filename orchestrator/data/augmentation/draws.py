"""Random numbers of samples, keyed by (seed, epoch, sample id). Pure: NumPy only.

The numbers of a sample depend on nothing else, so they are the same at any world size, in any
micro-batch and after any restart.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from orchestrator.data.stream import Words, hash_key, mix

Floats = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


class Draws:
    """The random numbers of n samples.

    Args:
        seed: the run's seed.
        epochs: the epoch of each sample, length n.
        ids: their ids, length n.
    """

    def __init__(self, seed: int, *, epochs: Sequence[int], ids: Sequence[str]) -> None:
        keys = [hash_key("pixels", seed, e, i) for e, i in zip(epochs, ids, strict=True)]
        self._keys = np.array(keys, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._keys)

    def words(self, purpose: str, count: int) -> Words:
        """Return 64 random bits, shape (n, count); other purposes have other ones."""
        keys = mix(self._keys ^ np.uint64(hash_key(purpose)))
        with np.errstate(over="ignore"):
            return mix(keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)

    def uniforms(self, purpose: str, count: int) -> Floats:
        """Return numbers in [0, 1), shape (n, count)."""
        return (self.words(purpose, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def symmetric_beta(alpha: float, uniforms: Floats) -> Floats:
    """Turn two uniforms in [0, 1), shape (n, 2), into a number from Beta(alpha, alpha), shape (n,).

    Exact for any alpha above 0 and without rejection: Bailey's polar method gives
    t = sqrt(2 alpha) c with 2 alpha degrees of freedom, and (1 + c / sqrt(1 + c^2)) / 2 is the
    Beta number that belongs to it (Bailey, "Polar Generation of Random Variates with the
    t-Distribution", Math. Comp. 62, 1994; Devroye, "Random Variate Generation in One Line of
    Code", WSC 1996, section 4).
    """
    with np.errstate(over="ignore"):
        radius = np.sqrt(np.expm1(-np.log1p(-uniforms[:, 0]) / alpha))
    # The largest radius a small alpha overflows to stands for all of them: lambda is 0 or 1.
    c = np.minimum(radius, 1e150) * np.cos(2 * np.pi * uniforms[:, 1])
    beta: Floats = 0.5 * (1 + c / np.hypot(c, 1))
    return beta
