"""Config + index -> the feeds of a run: what training, validation and evaluation read."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from orchestrator.config import Config
from orchestrator.data import balance, plan
from orchestrator.data.fetch import Layout, Work
from orchestrator.data.index import Index
from orchestrator.data.plan import Batching
from orchestrator.data.render import Reader, Render
from orchestrator.data.sources import Source, open_source


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
    """What a run reads: `batching` and `reader` are small; the source is opened when planning."""

    batching: Batching
    reader: Reader
    samples_per_epoch: int
    open_source: Callable[[], Source]

    @functools.cached_property
    def source(self) -> Source:
        """Read the table of shards, once."""
        return self.open_source()

    def works(self, *, step: int, stop_step: int) -> Iterator[Work]:
        """Yield the read tasks of steps [step, stop_step) with the places of their chunks."""
        order, locate = self.source.order, self.source.locate
        for task in plan.tasks(order, self.batching, step=step, stop_step=stop_step):
            yield Work(task, tuple(tuple(locate(window.chunk)) for window in task.windows))


def training_feed(config: Config, index: Index, *, num_workers: int) -> Feed:
    """Return the shuffled, augmented stream over all epochs, in steps of `global_batch`."""
    data, samples = config.data, index.splits["train"].samples
    batching = Batching.for_training(
        total=samples * config.train.max_epochs,
        global_batch=data.global_batch,
        num_workers=num_workers,
        max_micro_batch=data.max_micro_batch,
        sample_bytes=_sample_bytes(config),
    )
    return Feed(
        batching,
        _reader(config, index, batching, augment=True),
        samples,
        functools.partial(open_source, data, "train", seed=config.seed, shuffle=True),
    )


def evaluation_feed(
    config: Config, index: Index, *, split: str, passes: int, num_workers: int
) -> Feed:
    """Return `passes` passes over a split in the index's order, every image once in each."""
    samples = index.splits[split].samples
    batching = Batching.for_evaluation(
        samples=samples,
        passes=passes,
        num_workers=num_workers,
        max_batch=config.data.eval_batch,
        sample_bytes=_sample_bytes(config),
    )
    return Feed(
        batching,
        _reader(config, index, batching, augment=False),
        samples,
        functools.partial(open_source, config.data, split, seed=config.seed, shuffle=False),
    )


def _sample_bytes(config: Config) -> int:
    return 3 * config.data.image_size**2


def _reader(config: Config, index: Index, batching: Batching, *, augment: bool) -> Reader:
    weights = None
    if augment and config.data.class_weights is not None:
        weights = tuple(
            balance.class_weights(
                config.data.class_weights,
                classes=index.classes,
                class_samples=index.class_samples,
            ).tolist()
        )
    layout = Layout(index.columns, index.label_kind, index.classes, weights)
    return Reader(batching, Render(config.data, config.seed, augment), layout)
