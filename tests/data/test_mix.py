"""A mix: exact shares in every window, each component once in each epoch of its own."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.mix import Concatenation, MixedStream, digest_of, shares
from orchestrator.data.stream import ChunkSizes, Stream, Window

chunk_rows = st.lists(st.integers(1, 9), min_size=1, max_size=30)
weight = st.floats(0.01, 10)


def mix_of(parts, weights, *, window=4, seed=0, digest="m"):
    sizes = [ChunkSizes.from_rows(rows) for rows in parts]
    exact = shares(weights, [part.num_samples for part in sizes])
    return MixedStream(sizes, weights=exact, digest=digest, seed=seed, window_chunks=window)


def windows(order, start, stop):
    out: list[Window] = []
    while start < stop:
        out.append(order.window_at(start))
        assert out[-1].start == start
        assert int(out[-1].rows.sum()) == out[-1].stop - start
        start = out[-1].stop
    return out


def rows_of_component(all_windows, first_chunk, num_chunks):
    """Return (epoch, chunk, row) of what a component gives, in the order of the sections."""
    out = []
    for window in all_windows:
        columns = (window.epoch, window.chunk, window.first_row, window.rows)
        for epoch, chunk, first, rows in zip(*(c.tolist() for c in columns), strict=True):
            if first_chunk <= chunk < first_chunk + num_chunks:
                out += [(epoch, chunk - first_chunk, first + i) for i in range(rows)]
    return out


@settings(max_examples=200, deadline=None)
@given(st.lists(chunk_rows, min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_each_component_is_consumed_once_in_each_epoch_of_its_own(parts, window, data):
    weights = data.draw(st.lists(weight, min_size=len(parts), max_size=len(parts)))
    mixed = mix_of(parts, weights, window=window)
    seen = windows(mixed, 0, 4 * mixed.num_samples)
    first_chunk = 0
    for rows in parts:
        given_rows = rows_of_component(seen, first_chunk, len(rows))
        every = sorted((chunk, row) for chunk, n in enumerate(rows) for row in range(n))
        for start in range(0, len(given_rows), len(every)):
            part = given_rows[start : start + len(every)]
            assert {epoch for epoch, _, _ in part} == {start // len(every)}
            if len(part) == len(every):
                assert sorted(row[1:] for row in part) == every
        first_chunk += len(rows)


@settings(max_examples=300, deadline=None)
@given(st.lists(weight, min_size=1, max_size=8), st.integers(0, 10**12), st.integers(0, 500))
def test_shares_are_kept_to_the_sample_everywhere(weights, position, step):
    mixed = mix_of([[5] * 10] * len(weights), weights)
    before, after = mixed.consumed(position), mixed.consumed(position + step)
    assert sum(before) == position
    assert sum(after) == position + step
    assert all(a <= b for a, b in zip(before, after, strict=True))
    for count, share in zip(before, shares(weights, [50] * len(weights)), strict=True):
        assert abs(count - position * share) < len(weights)


def test_weights_are_shares_of_the_samples_not_of_the_indexes():
    mixed = mix_of([[8] * 1000, [8] * 10], [3, 1])
    window = mixed.window_at(mixed.num_samples // 2)
    assert window.stop - window.start == 32
    assert int(window.rows[window.chunk < 1000].sum()) == 24
    # The small one, 80 samples, has gone round again and again: 3 % of 8,080 * 3 / 4.
    assert set(window.epoch[window.chunk >= 1000].tolist()) <= {12, 13}


def test_without_weights_an_epoch_of_the_mix_is_one_of_each_component():
    mixed = mix_of([[5] * 30, [3] * 11, [1]], [None] * 3)
    for epoch in range(3):
        seen = windows(mixed, epoch * 184, (epoch + 1) * 184)
        assert {int(e) for window in seen for e in window.epoch} == {epoch}
        assert sum(int(window.rows.sum()) for window in seen) == 184


def test_a_window_of_a_mix_is_shuffled_as_a_whole():
    window = mix_of([[8] * 100, [8] * 100], [1, 1], window=8).window_at(0)
    section, _ = window.samples(0, 64)
    of_first = (window.chunk[section] < 100).astype(int)
    assert of_first.sum() == 32
    assert 16 < np.abs(np.diff(of_first)).sum() < 48


def test_seeds_digests_and_epochs_have_orders_of_their_own():
    def order(position=0, **options):
        window = mix_of([[4] * 50, [4] * 50], [1, 1], **options).window_at(position)
        return (window.key, *window.chunk.tolist())

    assert order() == order()
    assert len({order(), order(seed=1), order(digest="n"), order(400), order(16)}) == 5


def test_the_digest_of_a_mix_depends_on_order_and_weights():
    even, uneven = shares([1, 1], [9, 9]), shares([1, 2], [9, 9])
    digests = [digest_of(["a", "b"], even), digest_of(["b", "a"], even), digest_of("ab", uneven)]
    assert len(set(digests)) == 3
    assert digest_of(["a", "b"], shares([0.7, 0.7], [1, 9])) == digests[0]
    assert shares([0.1, 0.3], [1, 1]) == (Fraction(1, 4), Fraction(3, 4))


def test_the_order_of_a_mix_never_changes_between_releases():
    # Written down once: a run resumed under a newer version must find the same order.
    window = mix_of([[3, 3, 2], [4, 1]], [2, 1], window=3).window_at(0)
    section, row = window.samples(0, window.stop)
    assert list(zip(window.chunk[section].tolist(), row.tolist(), strict=True)) == [
        (3, 0),
        (1, 0),
        (1, 1),
        (3, 1),
        (1, 2),
        (0, 0),
        (3, 2),
    ]


def test_each_chunk_at_a_border_is_read_twice_and_no_other():
    # What mixing costs, stated in mix.py: k components, about k more chunks a window.
    count, window = 400, 16
    for k in (1, 2, 4):
        mixed = mix_of([[64] * (count // k)] * k, [1] * k, window=window)
        seen = windows(mixed, 0, mixed.num_samples)
        reads = sum(len(w.chunk) for w in seen) / count
        assert 1 <= reads <= 1 + k / window


@pytest.mark.parametrize("window", [1, 3])
def test_evaluation_takes_one_component_after_the_other(window):
    parts = [ChunkSizes.from_rows(rows) for rows in ([3, 3, 2], [4, 1])]
    orders = [
        Stream(part, digest="d", seed=0, window_chunks=window, shuffle=False) for part in parts
    ]
    joined = Concatenation(orders, num_chunks=[3, 2], digest="m")
    assert joined.num_samples == 13
    for epoch in range(2):
        seen = windows(joined, 13 * epoch, 13 * (epoch + 1))
        rows = [
            (int(w.chunk[s]), int(r))
            for w in seen
            for s, r in zip(*w.samples(w.start, w.stop), strict=True)
        ]
        assert rows == [(c, r) for c, n in enumerate([3, 3, 2, 4, 1]) for r in range(n)]
        assert {int(e) for w in seen for e in w.epoch} == {epoch}
        middle = joined.window_at(13 * epoch + 10)
        assert middle.start <= 13 * epoch + 10 < middle.stop
