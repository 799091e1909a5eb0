"""Worker side: the run's module in a process of its own, which validates one checkpoint."""

import collections
import contextlib
import gc
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytorch_lightning as pl
import torch

from orchestrator.config import BesideConfig, Config
from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.fetch import Work
from orchestrator.data.loader import Loader, Opened
from orchestrator.data.sources import read_data
from orchestrator.train import model
from orchestrator.train.saving import checkpoint, state
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.saving.staging import Staging
from orchestrator.train.strategies.precision import lightning_precision


class _Watch(pl.Callback):
    """Notes validation images that could not be decoded, and that batches end."""

    def __init__(self, loader: Loader, epoch: int, note: Callable[[], None]) -> None:
        self._loader = loader
        self._epoch = epoch
        self._note = note
        self.bad: list[dict[str, Any]] = []

    def on_validation_batch_end(self, *_: Any) -> None:
        self._note()
        assert self._loader.current is not None
        bad = self._loader.current.batch.bad
        self.bad += [{**entry, "epoch": self._epoch} for entry in bad]


def validate(
    run: str,
    config: Config,
    beside: BesideConfig,
    manifest: Manifest,
    *,
    note: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return what the module's validation logs with a checkpoint's weights, and the bad images.

    Every image of the split once, in one process: where the workers in line would average over
    their shares, this is the same mean. `note` is called after each batch.

    Raises:
        CheckpointError: a file of it is missing or damaged.
    """
    device = torch.device("cuda" if beside.gpus else "cpu")
    threads = max(1, int(beside.cpus))
    torch.set_num_threads(threads)
    index = read_data(config.data)
    module = model.build(config.model, num_classes=len(index.classes))
    with contextlib.closing(Staging()) as staging:
        folder = staging.folder()
        checkpoint.fetch(run, manifest, folder)
        state.load_module(module, folder)
    loader = _open_loader(config, device, threads)
    watch = _Watch(loader, manifest.epoch, note)
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        precision=lightning_precision(manifest.precision),
        callbacks=[watch],
        logger=False,
        # As in line: a module may keep what inference mode would spoil for training.
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    state.set_progress(trainer, step=manifest.step, epoch=manifest.epoch)
    with contextlib.closing(loader):
        trainer.validate(module, dataloaders=loader.take(1), verbose=False)
    return {name: float(v) for name, v in trainer.callback_metrics.items()}, watch.bad


def free_memory() -> None:
    """Give back what a validation that failed held, for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _open_loader(config: Config, device: torch.device, threads: int) -> Loader:
    index = read_data(config.data)
    feed = feeds.evaluation_feed(config, index, split="val", passes=1, num_workers=1)
    return Loader(
        feed.batching,
        rank=0,
        step=0,
        open_segment=lambda step: Opened(_blocks(feed, threads), 1, 1),
        to_device=ToDevice(
            device,
            config.data,
            label_kind=index.label_kind,
            num_classes=len(index.classes),
            seed=None,
        ),
        image_size=config.data.image_size,
    )


def _blocks(feed: Feed, threads: int) -> Generator[pa.Table, None, None]:
    """Yield the blocks of one pass in order; `threads` of its tasks are read at once.

    Not through Ray Data: this process has reserved the CPUs that its read tasks would ask for.
    """
    coming: collections.deque[Future[list[pa.Table]]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="validation-read") as pool:
        for work in feed.works(step=0, stop_step=1):
            coming.append(pool.submit(_read, feed, work))
            if len(coming) > threads:
                yield from coming.popleft().result()
        while coming:
            yield from coming.popleft().result()


def _read(feed: Feed, work: Work) -> list[pa.Table]:
    return list(feed.reader.blocks(work))
