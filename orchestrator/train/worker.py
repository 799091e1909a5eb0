"""Worker side: the function that every Ray Train worker runs."""

import dataclasses
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import ray.train.torch
import ray.util
from ray import cloudpickle
from ray.train.collective import broadcast_from_rank_zero

from orchestrator import cluster, storage
from orchestrator.config import Config, UserError
from orchestrator.data import feeds
from orchestrator.data.sources import read_data
from orchestrator.run import CONFIG_FILE, append_event
from orchestrator.train import checkpoint, feeding, model
from orchestrator.train.callback import Recorder
from orchestrator.train.job import Job
from orchestrator.train.journal import RunFacts
from orchestrator.train.precision import Choice, choose_precision
from orchestrator.train.trainer import Batches, build_trainer


def train_worker(payload: dict[str, Any]) -> None:
    """Train until the run converges or reaches its last epoch; resume where it was committed."""
    job: Job = cloudpickle.loads(payload["job"])
    _prepare_process(job)
    config, rank = job.config, ray.train.get_context().get_world_rank()
    num_workers = ray.train.get_context().get_world_size()
    index = read_data(config.data)
    with tempfile.TemporaryDirectory(
        prefix="orchestrator-resume-", ignore_cleanup_errors=True
    ) as folder:
        resumed = _find_checkpoint(job, Path(folder), rank)
        step = resumed.step if resumed else 0
        feed = feeds.training_feed(config, index, num_workers=num_workers)
        ended = resumed is not None and resumed.done not in ("", "max_epochs")
        if ended or step >= feed.batching.num_steps:
            return
        pl.seed_everything(config.seed, verbose=False)
        module = model.build(config.model, num_classes=len(index.classes))
        _check_module(module, config, feed.batching.accumulation)
        precision = _agree_on_precision(config, module, resumed, rank)
        placement = feeding.place_readers(job)
        loader = feeding.build_loader(feed, job, index, placement, rank=rank, step=step)
        facts = RunFacts(
            run=job.run,
            config=config,
            index_digest=index.digest,
            strategy=job.strategy.value,
            precision=precision.value,
            samples_per_epoch=feed.samples_per_epoch,
            board=job.board,
        )
        validation = (
            feeding.validation_loader(job, placement.beside(), rank)
            if "val" in index.splits
            else None
        )
        start = (resumed, Path(folder)) if resumed else None
        recorder = Recorder(facts, loader, validation, start)
        if rank == 0:
            append_event(
                job.run,
                "decided",
                precision=str(precision),
                strategy=str(job.strategy),
                decode_slots=f"{placement.slots}: {placement.reason}",
            )
        if hasattr(module, "total_steps"):
            module.total_steps = feed.batching.num_steps  # type: ignore[assignment]
        trainer = build_trainer(job, recorder, loader, precision)
        try:
            trainer.fit(module, datamodule=Batches(recorder, loader, validation))
        finally:
            loader.close()
            if validation is not None:
                validation.close()


def _prepare_process(job: Job) -> None:
    if not storage.exists(storage.join(job.run, CONFIG_FILE)):
        node = ray.util.get_node_ip_address()
        raise UserError(
            f"storage_path: the node {node} does not see {job.run}, where the run was opened; use "
            "an s3:// URI or a folder that all nodes share."
        )
    cluster.extend_imports(job.import_paths)
    # Blocks are mapped read-only from shared memory and never written to.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def _find_checkpoint(job: Job, folder: Path, rank: int) -> checkpoint.Manifest | None:
    """Fetch the newest whole checkpoint; rank 0 decides which, and clears what lies beyond it."""
    there = checkpoint.survey(job.run)
    found: checkpoint.Manifest | None = None
    problems = list(there.problems)
    if there.manifests:
        found, damaged = checkpoint.fetch_newest(job.run, there.manifests, folder)
        problems += damaged
    step = found.step if found else 0
    agreed = broadcast_from_rank_zero(step)
    if agreed != step:
        raise checkpoint.CheckpointError(
            f"worker {rank} reads the checkpoint of step {step} where worker 0 reads {agreed}; "
            f"check that {job.run} is the same storage on every node."
        )
    if rank == 0:
        checkpoint.rewind(job.run, step)
        for problem in problems:
            append_event(job.run, "checkpoint_refused", problem=problem)
    broadcast_from_rank_zero(None)  # nobody reads on before rank 0 has cleared
    return found


def _check_module(module: pl.LightningModule, config: Config, accumulation: int) -> None:
    if module.automatic_optimization or (
        accumulation == 1 and config.train.gradient_clip_norm is None
    ):
        return
    raise UserError(
        f"model.class_path={config.model.class_path!r} has automatic_optimization False, so "
        f"Lightning neither accumulates its {accumulation} micro-batches a step nor clips its "
        "gradient; raise data.max_micro_batch or scaling.num_workers, and set "
        "train.gradient_clip_norm to null."
    )


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
        # Plain words: the actor that passes them on would import Lightning for a Choice.
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
