"""What the workers of a planned run consume, without Ray or data: for tests of the order."""

from collections.abc import Sequence

import numpy as np

from orchestrator.data import plan
from orchestrator.data.stream import ChunkSizes, Ints, Order


def first_rows(*sizes: ChunkSizes) -> Ints:
    """Return how many samples lie before each chunk of some indexes, one after the other."""
    rows = np.concatenate([part.rows(np.arange(part.num_chunks)) for part in sizes])
    before: Ints = np.cumsum(rows) - rows
    return before


def batching(total: int, *, batch: int, workers: int, micro: int) -> plan.Batching:
    """Cut positions [0, total) into steps of `batch` and micro-batches of at most `micro`."""
    return plan.Batching.for_training(
        total=total,
        global_batch=batch,
        num_workers=workers,
        max_micro_batch=micro,
        sample_bytes=1 << 20,
    )


def steps(
    order: Order, cut: plan.Batching, firsts: Ints, *, step: int, stop_step: int
) -> list[Sequence[int]]:
    """Return the samples of each step in [step, stop_step), as its workers' pieces give them.

    Every piece is read from the windows of its own task, as a read task does it.
    """
    micros: dict[int, list[int]] = {}
    done: set[int] = set()
    for task in plan.tasks(order, cut, step=step, stop_step=stop_step):
        samples = _samples_of(task, firsts)
        for blocks in plan.rounds(task, cut):
            for worker, pieces in enumerate(blocks):
                for piece in pieces:
                    assert cut.worker(piece.micro) == worker
                    part = samples[piece.start - task.start : piece.stop - task.start]
                    assert piece.micro not in done
                    micros.setdefault(piece.micro, []).extend(part.tolist())
                    done |= {piece.micro} if piece.complete else set()
    assert done == micros.keys()
    each = cut.micro_batches
    for micro, samples_of_micro in micros.items():
        start, stop = cut.bounds(micro)
        assert len(samples_of_micro) == stop - start
    return [
        [sample for micro in range(s * each, (s + 1) * each) for sample in micros.get(micro, ())]
        for s in range(step, stop_step)
    ]


def _samples_of(task: plan.Task, firsts: Ints) -> Ints:
    parts = []
    for window in task.windows:
        start, stop = max(task.start, window.start), min(task.stop, window.stop)
        section, row = window.samples(start, stop)
        parts.append(firsts[window.chunk[section]] + row)
    return np.concatenate(parts)
