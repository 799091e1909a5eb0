"""A run's workers in bare gloo processes: its real batches, strategies, recorder; no Ray."""

import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray.train.torch  # noqa: F401  (Lightning's Ray strategies look it up)
import torch
from deepspeed.accelerator import get_accelerator
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import TorchElasticEnvironment

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from gloo import run_workers

from orchestrator.config import Config, UserError
from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.loader import Loader, Opened
from orchestrator.data.sources import read_data
from orchestrator.train.errors import OutOfMemory, is_out_of_memory
from orchestrator.train.loop.loops import Plateaus, Trainer
from orchestrator.train.loop.pushed import Pushed
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.loop.trainer import Batches
from orchestrator.train.loop.validator import Validator
from orchestrator.train.place import Place
from orchestrator.train.saving import checkpoint, lease
from orchestrator.train.saving.journal import RunFacts
from orchestrator.train.strategies.precision import Choice, lightning_precision
from orchestrator.train.strategies.strategy import build_strategy
from orchestrator.train.validation.timetable import Timetable

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run's workers."""

    run: str
    """Its folder, where checkpoints are committed and found again."""
    config: Config
    stop_after: int | None = None
    """Steps after which this start ends, as if it were killed there."""
    validator: Callable[[Recorder], pl.Callback] | None = None
    """Makes what validates; None: the workers do."""
    lease: str = ""
    """Token of the driver's lease on the run."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables that the workers shall have."""


@dataclasses.dataclass
class Ended:
    """What one worker saw."""

    error: str = ""
    """The user's mistake, or the lack of memory, that ended it; or empty."""
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arrays of the last step's weights, on worker 0."""
    rates: dict[int, float] = dataclasses.field(default_factory=dict)
    """Step, from 0 on -> the learning rate that it was made with."""
    noted: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the module noted."""


def train(num_workers: int, *starts: Start) -> list[list[Ended]]:
    """Run starts one after the other in `num_workers` processes; return what each worker saw."""
    with contextlib.ExitStack() as stack:
        runs = {start.run for start in starts}
        tokens = {run: stack.enter_context(lease.held(run)).renew() for run in runs}
        held = tuple(dataclasses.replace(start, lease=tokens[start.run]) for start in starts)
        by_worker = run_workers(_train_all, num_workers, held)
    return [[each[i] for each in by_worker] for i in range(len(starts))]


def _train_all(rank: int, num_workers: int, starts: tuple[Start, ...]) -> list[Ended]:
    return [_train(start, rank, num_workers) for start in starts]


class Quiet(Validator):
    """Reports to nobody: Ray Train is not there."""

    def report(self, *_: Any, **__: Any) -> None:
        pass


class _Silent:
    """Stands for the handle of the board's actor, which takes no answer to what it is told."""

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(remote=lambda *_: None)


class _Watch(pl.Callback):
    def __init__(self, start: Start, ended: Ended, loader: Loader) -> None:
        self._start, self._ended, self._loader = start, ended, loader
        self._done = 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._ended.rates.setdefault(trainer.global_step, rate)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        assert self._loader.current is not None
        self._done += self._loader.current.ends_step
        if self._done == self._start.stop_after:
            raise KeyError("killed")


def open_loader(feed: Feed, config: Config, *, rank: int, step: int) -> Loader:
    """Return a worker's batches, read by itself."""

    def open_segment(step: int) -> Opened:
        stop = feed.batching.num_steps
        every = (b for w in feed.works(step=step, stop_step=stop) for b in feed.reader.blocks(w))
        mine = itertools.islice(every, rank, None, feed.batching.num_workers)
        return Opened((block for block in mine), stop, stop)

    return Loader(
        feed.batching,
        rank=rank,
        step=step,
        open_segment=open_segment,
        to_device=ToDevice(CPU, config.data, num_classes=3),
        image_size=config.data.image_size,
    )


def _fp16_on_cpu(config: Config) -> list[MixedPrecision]:
    """Allow what Lightning's flag and DeepSpeed refuse on CPUs; PyTorch computes it, if slowly."""
    if config.train.precision != "16":
        return []
    if config.train.strategy != "ddp":
        get_accelerator().is_fp16_supported = lambda: True
        return []
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]


def _train(start: Start, rank: int, num_workers: int) -> Ended:
    torch.manual_seed(0)
    os.environ.update(start.env)
    config, index = start.config, read_data(start.config.data)
    feed = feeds.training_feed(config, index, num_workers=num_workers)
    manifests = checkpoint.survey(start.run).manifests
    # The recorder deletes it when it has read it.
    folder = Path(tempfile.mkdtemp(prefix="bare-") if manifests else "")
    found = checkpoint.fetch_newest(start.run, manifests, folder)[0] if manifests else None
    loader = open_loader(feed, config, rank=rank, step=found.step if found else 0)
    facts = RunFacts(
        run=start.run,
        config=config,
        index_digest=index.digest,
        strategy=config.train.strategy,
        precision=config.train.precision,
        samples_per_epoch=feed.samples_per_epoch,
        board=_Silent(),
        lease=start.lease,
    )
    validation = None
    if "val" in index.splits and config.train.validate.beside is None:
        timetable = Timetable(
            Place(feed.batching, feed.samples_per_epoch), config.train.validate.every_samples
        )
        passes = timetable.count_left(
            found.step if found else 0, validated=bool(found and found.metrics)
        )
        val = feeds.evaluation_feed(
            config, index, split="val", passes=passes, num_workers=num_workers
        )
        validation = open_loader(val, config, rank=rank, step=0)
    recorder = Recorder(facts, loader, validation, (found, folder) if found else None)
    pushed = Pushed(loader, validation, recorder)
    ended = Ended()
    module_name, _, class_name = config.model.class_path.rpartition(".")
    module = getattr(importlib.import_module(module_name), class_name)(**config.model.init_args)

    def weight() -> float:
        assert loader.current is not None
        return loader.current.weight

    strategy = build_strategy(Choice(config.train.strategy, ""), weight, CPU)
    strategy.timeline = recorder.clocks.timeline
    trainer = Trainer(
        recorder.place,
        accelerator="cpu",
        devices=num_workers,
        strategy=strategy,
        plugins=[TorchElasticEnvironment(), *_fp16_on_cpu(config)],
        precision=None if _fp16_on_cpu(config) else lightning_precision(config.train.precision),
        max_epochs=config.train.max_epochs,
        accumulate_grad_batches=loader.batching.accumulation,
        gradient_clip_val=config.train.gradient_clip_norm,
        callbacks=[
            recorder.clocks,
            recorder.guard,
            pushed,
            _Watch(start, ended, loader),
            Plateaus(recorder),
            recorder,
            (start.validator or Quiet)(recorder),
        ],
        logger=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with pushed.told():
            trainer.fit(module, datamodule=Batches(recorder, loader, validation))
    except (UserError, OutOfMemory) as error:
        ended.error = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        ended.error = f"not of a micro-batch: {error}"
    except KeyError:
        assert start.stop_after
    ended.noted = getattr(module, "noted", {})
    if not ended.error:
        weights = trainer.strategy.weights()
        if rank == 0:
            ended.weights = {name: value.float().numpy().copy() for name, value in weights.items()}
    return ended
