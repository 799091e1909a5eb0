"""Several indexes -> one stream of samples, each index with its share of every window. Pure.

A component gives consecutive rows of its own endless chunk order, epoch after epoch, so each of its
samples is consumed exactly once in each epoch *of its own*. A window of the mix ends wherever its
share does, so the chunk at each border is read for two windows: with k components about k more
chunks a window than without mixing, that is 1 + k / window_chunks times the bytes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from orchestrator.data.stream import ChunkOrder, ChunkSizes, Ints, Order, Window, hash_key


def shares(weights: Sequence[float | None], samples: Sequence[int]) -> tuple[Fraction, ...]:
    """Return each component's share of the samples, exactly; they add up to 1.

    Args:
        weights: relative ones, above 0; None everywhere: in proportion to `samples`, so that one
            epoch of the mix is one epoch of every component.
        samples: of each component.
    """
    exact = [
        Fraction(count) if weight is None else Fraction(repr(float(weight)))
        for weight, count in zip(weights, samples, strict=True)
    ]
    return tuple(weight / sum(exact) for weight in exact)


def digest_of(digests: Sequence[str], weights: Sequence[Fraction]) -> str:
    """Return what identifies a mix: its components' digests with their shares, in order."""
    parts = [[digest, str(weight)] for digest, weight in zip(digests, weights, strict=True)]
    return hashlib.sha256(json.dumps(["mix", parts]).encode()).hexdigest()


class MixedStream:
    """The order of samples of several indexes: a function of (digest, seed, position).

    One epoch is as many samples as all components have together. Chunks of a component are numbered
    after those of the components before it.

    Args:
        sizes: rows of every chunk, for each component.
        weights: their shares of the samples; they add up to 1.
        digest: of the mix.
        seed: the run's seed.
        window_chunks: how many chunks' worth of samples, of the components' mean size, are shuffled
            together. Every window but an epoch's last is of the same size.
    """

    def __init__(
        self,
        sizes: Sequence[ChunkSizes],
        *,
        weights: Sequence[Fraction],
        digest: str,
        seed: int,
        window_chunks: int,
    ) -> None:
        assert len(sizes) == len(weights) > 0
        assert sum(weights) == 1
        assert min(weights) > 0
        self.digest = digest
        self.num_samples = sum(part.num_samples for part in sizes)
        mean_rows = sum(w * part.usual_rows for w, part in zip(weights, sizes, strict=True))
        self.usual_window = max(1, int(mean_rows * window_chunks))
        self._key = (digest, seed)
        self._ratios = _ratios(weights)
        ends = np.cumsum([part.num_chunks for part in sizes]).tolist()
        self._components = [
            _Component(part, end - part.num_chunks, (digest, seed, number))
            for number, (part, end) in enumerate(zip(sizes, ends, strict=True))
        ]

    def window_at(self, position: int) -> Window:
        """Return the window that holds `position`."""
        epoch, offset = divmod(position, self.num_samples)
        number = offset // self.usual_window
        start = epoch * self.num_samples + number * self.usual_window
        stop = min(start + self.usual_window, (epoch + 1) * self.num_samples)
        bounds = zip(self._components, self.consumed(start), self.consumed(stop), strict=True)
        sections = [part for component, a, b in bounds for part in component.sections(a, b)]
        return Window(
            start=start,
            stop=stop,
            key=hash_key("window", *self._key, epoch, number),
            chunk=np.concatenate([section.chunk for section in sections]),
            first_row=np.concatenate([section.first_row for section in sections]),
            rows=np.concatenate([section.rows for section in sections]),
            epoch=np.concatenate(
                [np.full(len(section.rows), section.epoch) for section in sections]
            ),
        )

    def consumed(self, position: int) -> list[int]:
        """Return how many samples of each component lie before a window's border.

        They add up to `position`, never decrease, and differ by less than the number of components
        from the exact shares: each component takes its part of what those before it left.
        """
        out, rest = [], position
        for ratio in self._ratios:
            out.append(rest * ratio.numerator // ratio.denominator)
            rest -= out[-1]
        return out


def _ratios(weights: Sequence[Fraction]) -> list[Fraction]:
    """Return each weight as a part of itself and those after it."""
    return [weight / sum(weights[i:]) for i, weight in enumerate(weights)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sections:
    """Rows of consecutive chunks of one epoch's chunk order."""

    chunk: Ints
    first_row: Ints
    rows: Ints
    epoch: int


class _Component:
    """One index of a mix: the endless order of its rows, chunk after chunk, not yet shuffled."""

    def __init__(self, sizes: ChunkSizes, first_chunk: int, key: tuple[str, int, int]) -> None:
        self._sizes = sizes
        self._first_chunk = first_chunk
        self._key = key
        self._orders: dict[int, ChunkOrder] = {}

    def sections(self, start: int, stop: int) -> Iterator[_Sections]:
        """Yield where the component's rows [start, stop) lie, one epoch at a time."""
        while start < stop:
            epoch, offset = divmod(start, self._sizes.num_samples)
            count = min(stop - start, self._sizes.num_samples - offset)
            yield self._of_epoch(epoch, offset, offset + count)
            start += count

    def _of_epoch(self, epoch: int, start: int, stop: int) -> _Sections:
        order = self._order(epoch)
        first = order.slot_at(start)
        chunks = order.chunks(np.arange(first, order.slot_at(stop - 1) + 1))
        rows = self._sizes.rows(chunks)
        first_row = np.zeros(len(chunks), dtype=np.int64)
        first_row[0] = start - order.rows_before(first)
        rows[0] -= first_row[0]
        rows[-1] -= rows.sum() - (stop - start)
        return _Sections(self._first_chunk + chunks, first_row, rows, epoch)

    def _order(self, epoch: int) -> ChunkOrder:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            key = hash_key("chunks", *self._key, epoch)
            self._orders[epoch] = ChunkOrder(self._sizes, key)
        return self._orders[epoch]


class Concatenation:
    """One order after the other, each once in every epoch: what is evaluated of a mix.

    Args:
        orders: of each component.
        num_chunks: of each component; chunks are numbered as in `MixedStream`.
        digest: of the mix.
    """

    def __init__(self, orders: Sequence[Order], *, num_chunks: Sequence[int], digest: str) -> None:
        self.digest = digest
        self.usual_window = max(order.usual_window for order in orders)
        self._orders = orders
        self._ends = np.cumsum([order.num_samples for order in orders])
        self._first_chunk = np.cumsum(num_chunks) - np.asarray(num_chunks)
        self.num_samples = int(self._ends[-1])

    def window_at(self, position: int) -> Window:
        """Return the window that holds `position`."""
        epoch, offset = divmod(position, self.num_samples)
        number = int(np.searchsorted(self._ends, offset, side="right"))
        order = self._orders[number]
        before = int(self._ends[number]) - order.num_samples
        inner = epoch * order.num_samples + offset - before
        window = order.window_at(inner)
        return dataclasses.replace(
            window,
            start=window.start + position - inner,
            stop=window.stop + position - inner,
            chunk=window.chunk + self._first_chunk[number],
        )
