"""How well an order of samples is shuffled, in figures that a full shuffle has too. Pure."""

import dataclasses

import numpy as np

from orchestrator.data.stream import Ints, Order


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of one epoch's order; what a full shuffle of n samples has is said with each."""

    displacement: float
    """Mean distance between a sample's place in the index and in the order, as a share of n: 1/3
    for a full shuffle. Shuffling the chunks alone gives it."""
    neighbours: float
    """Mean distance in the order of samples that are neighbours in the index, as a share of n: 1/3
    for a full shuffle. A window keeps them within itself."""
    shards_per_batch: float
    """Different shards in a batch of consecutive samples, on average."""
    correlation: float
    """Between the index places of consecutive samples: 0 for a full shuffle, about
    1 / window_chunks for a windowed one, as the next sample is of the same chunk that often."""


def epoch_order(order: Order, first_rows: Ints, *, epoch: int = 0) -> Ints:
    """Return the index place of the sample at each position of an epoch, shape (n,).

    Args:
        order: of the samples.
        first_rows: samples of the index before each chunk, shape (num_chunks,).
        epoch: which.
    """
    position, stop = epoch * order.num_samples, (epoch + 1) * order.num_samples
    parts = []
    while position < stop:
        window = order.window_at(position)
        end = min(window.stop, stop)
        section, row = window.samples(position, end)
        parts.append(first_rows[window.chunk[section]] + row)
        position = end
    return np.concatenate(parts)


def measure(places: Ints, shards: Ints, *, batch: int) -> Quality:
    """Return the figures of an order.

    Args:
        places: index place of the sample at each position, a permutation, shape (n,).
        shards: shard of the sample at each index place, shape (n,).
        batch: samples of a batch; a last shorter one is left out.
    """
    count = len(places)
    positions = np.empty(count, dtype=np.int64)
    positions[places] = np.arange(count)
    batches = np.sort(shards[places[: count - count % batch]].reshape(-1, batch), axis=1)
    return Quality(
        displacement=float(np.abs(places - np.arange(count)).mean()) / count,
        neighbours=float(np.abs(np.diff(positions)).mean()) / count,
        shards_per_batch=1 + float((np.diff(batches, axis=1) != 0).sum(axis=1).mean()),
        correlation=float(np.corrcoef(places[:-1], places[1:])[0, 1]),
    )
