"""Driver side: whether what reading holds fits the cluster's memory. Pure."""

import dataclasses

from orchestrator.config import Config, UserError
from orchestrator.data.feeds import training_feed
from orchestrator.data.fetch import WINDOWS_HELD
from orchestrator.data.index import Index
from orchestrator.data.plan import TASK_ROWS

# The rest is for the training workers, page cache and everything else on the nodes.
_SHARE_OF_MEMORY = 0.5
# Ray starts to write objects to disk when its store is 80 % full.
_SHARE_OF_STORE = 0.8
# A worker trains on one block, fetches one, and one waits for it; each read task fills one more.
_BLOCKS_PER_WORKER = 3


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a cluster, all nodes together."""

    total: int
    object_store: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """Bytes that reading holds."""

    window: float
    """Of one window of encoded images."""
    windows: float
    """Of all windows that read tasks hold, in their nodes' memory."""
    rounds: float
    """Of the pixels that read tasks hold beside: a round has a block for every worker."""
    block: float
    """Of one block of pixels."""
    num_blocks: int
    """Blocks that wait at a time, in the object store."""

    @property
    def blocks(self) -> float:
        """Bytes of all blocks that wait at a time."""
        return self.num_blocks * self.block


def held_by_reading(
    config: Config, index: Index, *, slots: int, num_workers: int | None = None
) -> Reading:
    """Return what `slots` read tasks at once, and what they hand to the workers, hold.

    Args:
        config: the run.
        index: its data.
        slots: read tasks that run at once.
        num_workers: workers of the run; None: the most it uses.
    """
    data, split = config.data, index.splits["train"]
    workers = num_workers or config.scaling.max_workers
    window = data.window_chunks * split.bytes / split.chunks
    batching = training_feed(config, index, num_workers=workers).batching
    block = batching.block_batches * batching.micro_batch * 3 * data.image_size**2
    blocks = _BLOCKS_PER_WORKER * workers + slots
    task_pixels = 2 * max(TASK_ROWS, split.samples // split.chunks * data.window_chunks)
    round_bytes = min(workers * block, task_pixels * 3 * data.image_size**2)
    return Reading(window, slots * WINDOWS_HELD * window, slots * round_bytes, block, blocks)


def check_memory(config: Config, index: Index, memory: Memory, *, slots: int) -> None:
    """Refuse windows that do not fit the memory, and blocks that do not fit the object store.

    Args:
        config: the run.
        index: its data.
        memory: what the cluster has.
        slots: read tasks that run at once.

    Raises:
        UserError: with the field and what it needs.
    """
    for workers in sorted({config.scaling.min_workers, config.scaling.max_workers}):
        held = held_by_reading(config, index, slots=slots, num_workers=workers)
        _check_held(config, held, memory, slots=slots)


def _check_held(config: Config, held: Reading, memory: Memory, *, slots: int) -> None:
    data = config.data
    if held.windows + held.rounds > _SHARE_OF_MEMORY * memory.total:
        raise UserError(
            f"data.window_chunks={data.window_chunks}: such a window is {_gigabytes(held.window)}, "
            f"and {slots} read tasks hold {WINDOWS_HELD} each and a round of pixels, "
            f"{_gigabytes(held.windows + held.rounds)} of the cluster's "
            f"{_gigabytes(memory.total)}; lower it or data.decode_slots."
        )
    if held.blocks > _SHARE_OF_STORE * memory.object_store:
        raise UserError(
            f"data.max_micro_batch={data.max_micro_batch} of {data.image_size} x {data.image_size} "
            f"pixels makes blocks of {_gigabytes(held.block)}; the {held.num_blocks} that wait at "
            f"a time need {_gigabytes(held.blocks)} but the object store has "
            f"{_gigabytes(memory.object_store)}; lower it or data.decode_slots, or start Ray with "
            "a larger --object-store-memory."
        )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
