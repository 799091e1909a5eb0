"""Config + index -> the feeds of a run: what training, validation and evaluation read."""

from orchestrator.config import Config
from orchestrator.data.index import Index, read_chunks
from orchestrator.data.plan import Batching
from orchestrator.data.render import Feed, Render
from orchestrator.data.stream import Stream


def training_feed(config: Config, index: Index, *, num_workers: int) -> Feed:
    """Return the shuffled, augmented stream over all epochs, in steps of `global_batch`."""
    chunks = read_chunks(index, "train")
    stream = Stream(
        chunks.sizes,
        digest=index.digest,
        seed=config.seed,
        window_chunks=config.data.window_chunks,
    )
    batching = Batching.for_training(
        total=stream.num_samples * config.train.max_epochs,
        global_batch=config.data.global_batch,
        num_workers=num_workers,
        max_micro_batch=config.data.max_micro_batch,
    )
    return Feed(chunks, stream, batching, Render(config.data, config.seed, augment=True))


def evaluation_feed(
    config: Config, index: Index, *, split: str, passes: int, num_workers: int
) -> Feed:
    """Return `passes` passes over a split in the index's order, every image once in each."""
    chunks = read_chunks(index, split)
    stream = Stream(
        chunks.sizes,
        digest=index.digest,
        seed=config.seed,
        window_chunks=config.data.window_chunks,
        shuffle=False,
    )
    batching = Batching.for_evaluation(
        samples=stream.num_samples,
        passes=passes,
        num_workers=num_workers,
        max_batch=config.data.eval_batch,
    )
    return Feed(chunks, stream, batching, Render(config.data, config.seed, augment=False))
