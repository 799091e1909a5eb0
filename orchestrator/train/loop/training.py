"""Worker side: from what a worker has begun to read to the end of training, by Lightning."""

import contextlib
import dataclasses
from pathlib import Path

import pytorch_lightning as pl
import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero

from orchestrator.config import Config, UserError
from orchestrator.data.feeds import Feed
from orchestrator.data.index import Index
from orchestrator.data.loader import Loader
from orchestrator.data.source import Placement
from orchestrator.run import append_event
from orchestrator.train import feeding, memory_limits, model
from orchestrator.train.job import Job
from orchestrator.train.loop.pushed import Pushed
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.loop.trainer import Batches, build_trainer
from orchestrator.train.module import ImageClassifier
from orchestrator.train.place import Place
from orchestrator.train.saving import checkpoint
from orchestrator.train.saving.journal import RunFacts
from orchestrator.train.saving.staging import Staging
from orchestrator.train.strategies import choose
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.strategies.precision import choose_precision
from orchestrator.train.validation.timetable import Timetable


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What a worker knows and has begun when Lightning takes over."""

    job: Job
    index: Index
    feed: Feed
    resumed: checkpoint.Manifest | None
    """The checkpoint that this start goes on from."""
    folder: Path
    """Where its files lie."""
    staging: Staging
    placement: Placement
    loader: Loader
    """It reads already."""


def train(work: Work) -> None:
    """Train to the end of the run."""
    with contextlib.ExitStack() as opened:
        _train(work, opened)


def _train(work: Work, opened: contextlib.ExitStack) -> None:
    job, index, feed, resumed = work.job, work.index, work.feed, work.resumed
    config, rank = job.config, ray.train.get_context().get_world_rank()
    step = resumed.step if resumed else 0
    job = _with_strategy(job, len(index.classes), resumed, rank)
    pl.seed_everything(config.seed, verbose=False)
    module = model.build(config.model, num_classes=len(index.classes))
    _check_module(module, job)
    job.startup.mark("model")
    precision = _agree_on_precision(config, module, resumed, rank)
    job.startup.mark("precision")
    facts = RunFacts(
        run=job.run,
        config=config,
        index_digest=index.digest,
        strategy=job.strategy.value,
        precision=precision.value,
        samples_per_epoch=feed.samples_per_epoch,
        board=job.board,
        lease=job.lease,
    )
    timetable = Timetable(
        Place(feed.batching, feed.samples_per_epoch), config.train.validate.every_samples
    )
    passes = timetable.count_left(step, validated=resumed is not None and bool(resumed.metrics))
    validation = (
        feeding.validation_loader(job, work.placement.beside(), rank, passes=passes)
        if "val" in index.splits and job.validation is None
        else None
    )
    start = (resumed, work.folder) if resumed else None
    recorder = Recorder(facts, work.loader, validation, start)
    if rank == 0:
        _tell_decisions(work, job, precision)
    _tell_length(module, feed.batching.num_steps)
    pushed = Pushed(work.loader, validation, recorder)
    trainer = build_trainer(
        job, recorder, work.loader, pushed, precision, scratch=work.staging.folder()
    )
    if validation is not None:
        opened.callback(validation.close)
    with pushed.told():
        trainer.fit(module, datamodule=Batches(recorder, work.loader, validation))


def _tell_decisions(work: Work, job: Job, precision: Choice) -> None:
    batching, placement = work.feed.batching, work.placement
    limits = memory_limits.describe(job.limits)
    if limits:
        job.board.say.remote(limits)
    append_event(
        job.run,
        "decided",
        precision=str(precision),
        strategy=str(job.strategy),
        decode_slots=f"{placement.slots}: {placement.reason}",
        micro_batch=f"{batching.micro_batch}: {limits or 'as data.max_micro_batch allows'}",
        slots=placement.slots,
        spare_cpus=feeding.spare_cpus(job),
        accumulation=batching.accumulation,
    )


def _tell_length(module: pl.LightningModule, num_steps: int) -> None:
    """Set the steps of our own module's schedule; a user's `total_steps` may mean anything."""
    if isinstance(module, ImageClassifier):
        module.total_steps = num_steps


def _check_module(module: pl.LightningModule, job: Job) -> None:
    """Hold a module that optimizes by hand against what Lightning then leaves to it.

    At the fewest workers: an elastic run must not end where it shrinks.
    """
    if module.automatic_optimization:
        return
    data, fewest = job.config.data, job.config.scaling.min_workers
    by_hand = f"model.class_path={job.config.model.class_path!r} has automatic_optimization False"
    share = -(-data.global_batch // fewest)
    if share > data.max_micro_batch:
        remedy = f"raise data.max_micro_batch to {share}, or scaling.num_workers"
        if memory_limits.MICRO_BATCH in job.limits:
            remedy = "more ran out of memory, so raise scaling.num_workers, or take a smaller model"
        raise UserError(
            f"{by_hand}, so that its share of a step must be one micro-batch, but on {fewest} "
            f"workers that is {share} samples and data.max_micro_batch is {data.max_micro_batch}; "
            f"{remedy}."
        )
    if job.config.train.gradient_clip_norm is not None:
        raise UserError(
            f"{by_hand}, so that Lightning does not clip its gradient; set "
            f"train.gradient_clip_norm={job.config.train.gradient_clip_norm:g} to null."
        )


def _with_strategy(
    job: Job, num_classes: int, resumed: checkpoint.Manifest | None, rank: int
) -> Job:
    """Let worker 0's GPU decide for all what the driver, which has none, left open."""
    if job.strategy.value != choose.UNDECIDED:
        return job
    if resumed is not None:
        choice = Choice(resumed.strategy, f"as before the resume at step {resumed.step}")
        return dataclasses.replace(job, strategy=choice)
    mine = choose.choose_here(job.config, num_classes=num_classes) if rank == 0 else None
    # Plain words: the actor that passes them on would import Lightning for a Choice.
    agreed = broadcast_from_rank_zero(dataclasses.astuple(mine) if mine else None)
    return dataclasses.replace(job, strategy=Choice(*agreed))


def _agree_on_precision(
    config: Config, module: pl.LightningModule, resumed: checkpoint.Manifest | None, rank: int
) -> Choice:
    """Let worker 0 choose for all; a resumed run keeps the arithmetic it was started with."""
    if resumed is not None and config.train.precision == "auto":
        return Choice(resumed.precision, f"as before the resume at step {resumed.step}")
    choice: tuple[str, str] | None = None
    if rank == 0:
        data = config.data
        num_workers = ray.train.get_context().get_world_size()
        batch = min(data.max_micro_batch, -(-data.global_batch // num_workers))
        choice = dataclasses.astuple(
            choose_precision(
                config.train.precision,
                module,
                device=ray.train.torch.get_device(),
                batch=batch,
                image_size=data.image_size,
            )
        )
    return Choice(*broadcast_from_rank_zero(choice))
