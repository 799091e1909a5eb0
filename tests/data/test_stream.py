"""The order of samples: a permutation in every epoch, resumable anywhere, the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.stream import ChunkSizes, Permutation, Stream, hash_key, shuffled

AWKWARD_SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 101, 1023, 1024, 1025, 65_535, 65_537]
chunk_rows = st.lists(st.integers(1, 7), min_size=1, max_size=40)


def build(rows: list[int], *, seed: int = 0, window: int = 4, digest: str = "d") -> Stream:
    return Stream(ChunkSizes.from_rows(rows), digest=digest, seed=seed, window_chunks=window)


def order(stream: Stream, start: int, stop: int, rows: list[int]) -> list[int]:
    """Return sample numbers (in the index's order) at positions [start, stop)."""
    firsts = np.concatenate([[0], np.cumsum(rows)])
    out: list[int] = []
    while start < stop:
        window = stream.window_at(start)
        section, row = window.samples(start, min(stop, window.stop))
        out += (firsts[window.chunk[section]] + row).tolist()
        start = window.stop
    return out


@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_permutation_is_a_bijection_with_an_inverse(size: int) -> None:
    permutation = Permutation(size, key=hash_key("test", size))
    image = permutation.forward(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert np.array_equal(permutation.backward(image), np.arange(size))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutation_of_any_size_and_key(size: int, key: int) -> None:
    image = Permutation(size, key).forward(np.arange(size))
    assert len(np.unique(image)) == size
    assert image.min() == 0
    assert image.max() == size - 1


@given(chunk_rows, st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_is_a_permutation(rows: list[int], window: int, epoch: int) -> None:
    stream = build(rows, window=window)
    n = stream.num_samples
    assert sorted(order(stream, epoch * n, (epoch + 1) * n, rows)) == list(range(n))


@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_awkward_numbers_of_one_row_chunks(size: int) -> None:
    stream = build([1] * size, window=16)
    assert sorted(order(stream, 0, size, [1] * size)) == list(range(size))


@given(chunk_rows, st.integers(1, 9), st.data())
def test_resume_anywhere_equals_the_uninterrupted_stream(
    rows: list[int], window: int, data: st.DataObject
) -> None:
    stream = build(rows, window=window)
    end = 3 * stream.num_samples
    cut = data.draw(st.integers(0, end))
    uninterrupted = order(stream, 0, end, rows)
    assert order(build(rows, window=window), cut, end, rows) == uninterrupted[cut:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = [5] * 30
    n = 150
    streams = [build(rows, seed=seed) for seed in (0, 1)]
    orders = [tuple(order(s, e * n, (e + 1) * n, rows)) for s in streams for e in range(3)]
    # Also seed 0 epoch 1 must not be seed 1 epoch 0, as it is where seeds are added.
    assert len(set(orders)) == len(orders)
    assert order(build(rows, digest="other"), 0, n, rows) != list(orders[0])


def test_the_order_never_changes_between_releases() -> None:
    # Written down once: a run resumed under a newer version must find the same order.
    rows = [3, 3, 2, 3, 1]
    assert order(build(rows, window=2, seed=7), 0, 12, rows) == [
        2,
        0,
        11,
        1,
        5,
        10,
        9,
        8,
        3,
        4,
        6,
        7,
    ]
    assert shuffled(8, key=42).tolist() == [5, 2, 7, 3, 4, 0, 1, 6]


@pytest.mark.parametrize("samples", [10**6, 10**8, 10**10])
def test_ten_billion_samples_without_data(samples: int) -> None:
    usual, chunks = 64, samples // 64
    odd = np.arange(1000, dtype=np.int64) * (chunks // 1000)
    sizes = ChunkSizes(chunks, usual, odd, np.full(1000, 13, dtype=np.int64))
    stream = Stream(sizes, digest="big", seed=0, window_chunks=16)
    n = stream.num_samples
    assert n == chunks * 64 - 1000 * 51
    for position in (0, n // 3, n - 1, n, 5 * n + n // 7):
        window = stream.window_at(position)
        assert window.start <= position < window.stop
        section, row = window.samples(position, min(position + 50, window.stop))
        assert (row < sizes.rows(window.chunk)[section]).all()
        following = stream.window_at(window.stop)
        assert following.start == window.stop


@settings(max_examples=30)
@given(st.integers(200, 400), st.integers(0, 100))
def test_windows_mix_chunks_from_everywhere(chunks: int, seed: int) -> None:
    stream = build([4] * chunks, seed=seed, window=16)
    first = stream.window_at(0)
    section, _ = first.samples(0, 64)
    assert len(np.unique(section)) == 16
    # Sixteen of some hundred chunks drawn at random all lie in one half with odds of 2 ** -15.
    assert first.chunk.min() < chunks / 2 < first.chunk.max() or chunks < 32
