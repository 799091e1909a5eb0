"""Steps, micro-batches and read tasks: exactly once at any world size, in one order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import plan
from orchestrator.data.plan import Batching, Piece
from orchestrator.data.stream import ChunkSizes, Stream

WORLD_SIZES = [1, 2, 3, 5, 8]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Stream, int, int, int]:
    """Return a stream, a global batch, a number of epochs and a largest micro-batch."""
    rows = draw(st.lists(st.integers(1, 6), min_size=1, max_size=30))
    window = draw(st.integers(1, 40))
    stream = Stream(ChunkSizes.from_rows(rows), digest="d", seed=0, window_chunks=window)
    global_batch = draw(st.integers(1, stream.num_samples))
    return stream, global_batch, draw(st.integers(1, 3)), draw(st.integers(1, 20))


def batching(case: tuple[Stream, int, int, int], num_workers: int, *, side: int = 1) -> Batching:
    stream, global_batch, epochs, max_micro_batch = case
    return Batching.for_training(
        total=stream.num_samples * epochs,
        global_batch=global_batch,
        num_workers=num_workers,
        max_micro_batch=max_micro_batch,
        sample_bytes=plan.BLOCK_BYTES // side,
    )


def dealt(stream: Stream, batches: Batching, step: int, stop: int) -> list[list[list[Piece]]]:
    """Deal all blocks of steps [step, stop) in strict round robin, as Ray Data does."""
    tasks = plan.tasks(stream, batches, step=step, stop_step=stop)
    blocks = [block for task in tasks for whole in plan.rounds(task, batches) for block in whole]
    n = batches.num_workers
    assert len(blocks) % n == 0  # else Ray Data drops the last ones
    return [blocks[rank::n] for rank in range(n)]


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(WORLD_SIZES), st.integers(1, 30), st.data())
def test_every_position_is_dealt_once_to_the_worker_that_holds_its_micro_batch(
    case: tuple[Stream, int, int, int], num_workers: int, side: int, data: st.DataObject
) -> None:
    batches = batching(case, num_workers, side=side)
    step = data.draw(st.integers(0, batches.num_steps - 1))
    stop = data.draw(st.integers(step + 1, batches.num_steps))
    seen: list[int] = []
    for rank, blocks in enumerate(dealt(case[0], batches, step, stop)):
        due = step * batches.micro_batches + rank
        position = batches.bounds(due)[0]
        for piece in (piece for block in blocks for piece in block):
            assert (piece.micro, piece.start) == (due, position)
            seen += range(piece.start, piece.stop)
            position = piece.stop
            if piece.complete:
                assert position == batches.bounds(due)[1]
                due += num_workers
                position = batches.bounds(due)[0]
        assert due == stop * batches.micro_batches + rank
    first, last = batches.step_bounds(step)[0], batches.step_bounds(stop - 1)[1]
    assert sorted(seen) == list(range(first, last))


@given(st.integers(1, 64), st.integers(1, 512))
def test_a_block_holds_about_as_many_bytes_as_are_aimed_at(micro_batch: int, side: int) -> None:
    batches = Batching.for_training(
        total=10_000, global_batch=micro_batch, num_workers=1, max_micro_batch=64,
        sample_bytes=3 * side**2,
    )  # fmt: skip
    one = micro_batch * 3 * side**2
    assert 1 <= batches.block_batches <= 16
    assert batches.block_batches * one <= max(one, 1.5 * plan.BLOCK_BYTES)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_each_step_holds_the_same_samples_at_every_world_size(
    case: tuple[Stream, int, int, int],
) -> None:
    for num_workers in WORLD_SIZES:
        batches = batching(case, num_workers)
        per_step = batches.micro_batches
        for step in range(batches.num_steps):
            bounds = [batches.bounds(step * per_step + k) for k in range(per_step)]
            start = step * case[1]
            assert bounds[0][0] == start
            assert bounds[-1][1] == min(start + case[1], batches.total)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
            sizes = [stop - start for start, stop in bounds]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= case[3]


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(WORLD_SIZES))
def test_weighted_losses_average_to_the_single_process_mean(
    case: tuple[Stream, int, int, int], num_workers: int
) -> None:
    batches = batching(case, num_workers)
    for step in {0, batches.num_steps - 1}:
        start, stop = batches.step_bounds(step)
        losses = {position: float(position**2 % 97) for position in range(start, stop)}
        reduced = 0.0
        for k in range(batches.micro_batches):
            micro = step * batches.micro_batches + k
            low, high = batches.bounds(micro)
            if high > low:
                mean = sum(losses[p] for p in range(low, high)) / (high - low)
                weight = batches.loss_weight(micro, high - low)
                reduced += mean * weight / batches.micro_batches
        assert reduced == pytest.approx(sum(losses.values()) / (stop - start))


@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 64), st.integers(1, 3))
def test_evaluation_gives_every_worker_equally_many_full_batches(
    samples: int, num_workers: int, max_batch: int, passes: int
) -> None:
    if samples < num_workers:
        return  # refused before a run starts
    batches = Batching.for_evaluation(
        samples=samples, passes=passes, num_workers=num_workers, max_batch=max_batch
    )
    bounds = [batches.bounds(k) for k in range(batches.micro_batches * passes)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == samples * passes
    assert all(stop > start for start, stop in bounds)


def test_a_chunk_is_read_by_one_task_only() -> None:
    stream = Stream(ChunkSizes.from_rows([64] * 500), digest="d", seed=0, window_chunks=16)
    batches = Batching.for_training(
        total=stream.num_samples, global_batch=96, num_workers=2, max_micro_batch=64
    )
    tasks = plan.tasks(stream, batches, step=0, stop_step=batches.num_steps)
    read = [chunk for task in tasks for window in task.windows for chunk in window.chunk.tolist()]
    assert sorted(read) == list(range(500))


def test_an_accumulation_is_derived_from_the_global_batch() -> None:
    batches = Batching.for_training(
        total=10_000, global_batch=256, num_workers=2, max_micro_batch=48
    )
    assert batches.accumulation == 3
    assert batches.micro_batches == 6
    assert batches.num_steps == 40
    assert batches.step_bounds(39) == (9984, 10_000)
