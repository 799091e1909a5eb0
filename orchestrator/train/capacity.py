"""Driver side: whether what reading holds fits the cluster's memory. Pure."""

import dataclasses

from orchestrator.config import Config, UserError
from orchestrator.data.feeds import training_feed
from orchestrator.data.fetch import WINDOWS_HELD
from orchestrator.data.index import Index

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
    data, split = config.data, index.splits["train"]
    window = data.window_chunks * split.bytes / split.chunks
    held = slots * WINDOWS_HELD * window
    if held > _SHARE_OF_MEMORY * memory.total:
        raise UserError(
            f"data.window_chunks={data.window_chunks}: such a window is {_gigabytes(window)}, and "
            f"{slots} read tasks hold {WINDOWS_HELD} each, {_gigabytes(held)} of the cluster's "
            f"{_gigabytes(memory.total)}; lower it or data.decode_slots."
        )
    batching = training_feed(config, index, num_workers=config.scaling.num_workers).batching
    micro_batch = -(-data.global_batch // batching.micro_batches)
    block = batching.block_batches * micro_batch * 3 * data.image_size**2
    blocks = _BLOCKS_PER_WORKER * config.scaling.num_workers + slots
    if blocks * block > _SHARE_OF_STORE * memory.object_store:
        raise UserError(
            f"data.max_micro_batch={data.max_micro_batch} of {data.image_size} x {data.image_size} "
            f"pixels makes blocks of {_gigabytes(block)}; the {blocks} that wait at a time need "
            f"{_gigabytes(blocks * block)} but the object store has "
            f"{_gigabytes(memory.object_store)}; lower it or data.decode_slots, or start Ray with "
            "a larger --object-store-memory."
        )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
