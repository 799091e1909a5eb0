"""Every sample once, in one order, at any number of workers and after any resume; how shuffled."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from consumed import batching, first_rows, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.mix import MixedStream, shares
from orchestrator.data.quality import epoch_order, measure
from orchestrator.data.stream import ChunkSizes, Order, Stream

PRIME = 100_003
WORLDS = (1, 2, 4)
chunk_rows = st.lists(st.integers(1, 9), min_size=1, max_size=60)


def prime_sizes() -> ChunkSizes:
    rows = np.full(PRIME // 64 + 1, 64)
    rows[-1] = PRIME % 64
    rows[100:110] += np.array([5, -5] * 5)
    return ChunkSizes.from_rows(rows)


def stream_of(sizes: ChunkSizes, *, window: int = 16, seed: int = 0) -> Stream:
    return Stream(sizes, digest="d", seed=seed, window_chunks=window)


def mix_of(parts: list[ChunkSizes], weights: list[float | None], window: int) -> MixedStream:
    exact = shares(weights, [part.num_samples for part in parts])
    return MixedStream(parts, weights=exact, digest="m", seed=3, window_chunks=window)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("batch", "micro"), [(256, 64), (1000, 48), (97, 97)])
def test_every_sample_once_in_each_epoch(workers: int, batch: int, micro: int) -> None:
    sizes = prime_sizes()
    assert sizes.num_samples == PRIME
    cut = batching(2 * PRIME, batch=batch, workers=workers, micro=micro)
    consumed = steps(stream_of(sizes), cut, first_rows(sizes), step=0, stop_step=cut.num_steps)
    assert {len(step) for step in consumed[:-1]} == {batch}
    samples = np.concatenate(consumed)
    for epoch in range(2):
        part = samples[epoch * PRIME : (epoch + 1) * PRIME]
        assert np.array_equal(np.sort(part), np.arange(PRIME))


@pytest.mark.parametrize("workers", [2, 7])
def test_a_mix_by_size_has_every_sample_once_in_each_epoch(workers: int) -> None:
    parts = [prime_sizes(), ChunkSizes.from_rows([7] * 1001), ChunkSizes.from_rows([1])]
    total = sum(part.num_samples for part in parts)
    mixed = mix_of(parts, [None, None, None], 16)
    cut = batching(2 * total, batch=1000, workers=workers, micro=48)
    samples = np.concatenate(steps(mixed, cut, first_rows(*parts), step=0, stop_step=cut.num_steps))
    for epoch in range(2):
        part = samples[epoch * total : (epoch + 1) * total]
        assert np.array_equal(np.sort(part), np.arange(total))


def check_same_order(
    data: st.DataObject, build: Callable[[], Order], sizes: list[ChunkSizes]
) -> None:
    """Compare the steps of a run at 1, 2 and 4 workers, and resumed at another world size."""
    order = build()
    batch = data.draw(st.integers(4, 30), "batch")
    micro = data.draw(st.integers(1, 9), "micro")
    total = data.draw(st.integers(batch, 3 * order.num_samples + batch), "total")
    cuts = {n: batching(total, batch=batch, workers=n, micro=micro) for n in WORLDS}
    stop = cuts[1].num_steps
    firsts = first_rows(*sizes)
    runs = {n: steps(order, cut, firsts, step=0, stop_step=stop) for n, cut in cuts.items()}
    assert runs[1] == runs[2] == runs[4]
    assert sum(map(len, runs[1])) == total
    step = data.draw(st.integers(0, stop - 1), "resume at")
    world = data.draw(st.sampled_from(WORLDS), "on")
    resumed = steps(build(), cuts[world], firsts, step=step, stop_step=stop)
    assert resumed == runs[1][step:]


@settings(max_examples=250, deadline=None)
@given(chunk_rows, st.integers(1, 20), st.data())
def test_any_world_size_and_any_resume_give_the_same_order(
    rows: list[int], window: int, data: st.DataObject
) -> None:
    sizes = ChunkSizes.from_rows(rows)
    check_same_order(data, lambda: stream_of(sizes, window=window), [sizes])


@settings(max_examples=250, deadline=None)
@given(st.lists(chunk_rows, min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_a_mix_has_the_same_order_at_any_world_size(
    parts: list[list[int]], window: int, data: st.DataObject
) -> None:
    sizes = [ChunkSizes.from_rows(rows) for rows in parts]
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(parts), max_size=len(parts)))
    check_same_order(data, lambda: mix_of(sizes, list(weights), window), sizes)


@pytest.mark.parametrize("window", [1, 4, 16, 64])
def test_the_order_is_as_shuffled_as_we_say(window: int) -> None:
    # 200 shards of 16 chunks of 32 samples; batches of 256.
    shard_rows, chunks, batch = 512, 3200, 256
    sizes = ChunkSizes.from_rows([32] * chunks)
    count = sizes.num_samples
    places = epoch_order(stream_of(sizes, window=window), first_rows(sizes))
    assert np.array_equal(np.sort(places), np.arange(count))
    shards = np.arange(count) // shard_rows
    found = measure(places, shards, batch=batch)
    full = measure(np.random.default_rng(0).permutation(count), shards, batch=batch)
    # What every window keeps: samples go anywhere, as in a full shuffle (1/3), but for the error
    # of a mean over the chunks, which move as wholes.
    assert abs(found.displacement - 1 / 3) < 1 / math.sqrt(chunks)
    assert abs(full.displacement - 1 / 3) < 1 / math.sqrt(count)
    # What the window limits: one in `window` consecutive pairs is of the same chunk; and a batch
    # draws on the window's chunks, of which few are of the same shard.
    assert abs(found.correlation - 1 / window) < 4 / math.sqrt(chunks)
    assert abs(full.correlation) < 4 / math.sqrt(count)
    drawn = max(window, batch // 32)
    of_window = 32 * window / max(batch, 32 * window)
    seen = drawn * (1 - (1 - 1 / drawn) ** batch) if of_window == 1 else drawn
    distinct = 200 * (1 - (1 - 1 / 200) ** seen)
    assert 0.9 * distinct < found.shards_per_batch < min(1.1 * distinct, full.shards_per_batch)
    # Neighbours in the index stay within a window, at a third of its length on average, except
    # the pairs that two chunks divide.
    inside = (31 / 32) * window * 32 / 3 / count
    assert abs(found.neighbours - inside - 1 / 32 / 3) < 0.15 * (inside + 1 / 32 / 3)


def test_figures_of_an_order_that_is_none() -> None:
    count = 4096
    found = measure(np.arange(count), np.arange(count) // 64, batch=128)
    assert found.displacement == 0
    assert found.neighbours == pytest.approx(1 / count)
    assert found.shards_per_batch == 2
    assert found.correlation == pytest.approx(1)
