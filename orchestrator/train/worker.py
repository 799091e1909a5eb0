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
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from ray import cloudpickle
from ray.train.collective import broadcast_from_rank_zero
from ray.train.lightning import RayLightningEnvironment, prepare_trainer

from orchestrator import cluster, storage
from orchestrator.config import Config, UserError
from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.index import Index
from orchestrator.data.loader import Loader, Opened, OpenSegment, Pass
from orchestrator.data.source import Placement, blocks_of, plan_segment, split_segment
from orchestrator.data.sources import read_data
from orchestrator.run import CONFIG_FILE, append_event
from orchestrator.train import checkpoint, model
from orchestrator.train.callback import Recorder
from orchestrator.train.journal import RunFacts
from orchestrator.train.precision import Choice, choose_precision, lightning_precision
from orchestrator.train.strategy import build_strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to every worker."""

    run: str
    config: Config
    strategy: Choice
    share: int
    """Runs that divide the cluster between them."""
    may_grow: bool
    """Whether the cluster might add nodes."""
    board: Any
    """Handle of the progress board actor."""
    import_paths: list[str]
    """Folders of the driver that the user's module may be imported from."""


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
        placement = _placement(job)
        loader = _loader(feed, job, index, placement, rank=rank, step=step)
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
            _validation_loader(job, placement.beside(), rank) if "val" in index.splits else None
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
        trainer = _trainer(job, recorder, loader, precision)
        try:
            trainer.fit(module, datamodule=_Batches(recorder, loader, validation))
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
        batch = min(data.max_micro_batch, -(-data.global_batch // config.scaling.num_workers))
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


def _placement(job: Job) -> Placement:
    """Decide where to read: now, when the workers hold their CPUs and a cluster has grown."""
    scaling = job.config.scaling
    return Placement.choose(
        requested=job.config.data.decode_slots,
        cluster_cpus=ray.cluster_resources().get("CPU", 0),
        worker_cpus=scaling.num_workers * scaling.cpus_per_worker * job.share,
        may_grow=job.may_grow,
        share=job.share,
    )


def _loader(
    feed: Feed, job: Job, index: Index, placement: Placement, *, rank: int, step: int
) -> Loader:
    return Loader(
        feed.batching,
        rank=rank,
        step=step,
        open_segment=_segment_opener(feed, placement, rank),
        to_device=ToDevice(
            ray.train.torch.get_device(),
            job.config.data,
            label_kind=index.label_kind,
            num_classes=len(index.classes),
            seed=job.config.seed if feed.reader.render.augment else None,
        ),
        image_size=job.config.data.image_size,
    )


def _segment_opener(feed: Feed, placement: Placement, rank: int) -> OpenSegment:
    def open_segment(step: int) -> Opened:
        opened = None
        if rank == 0:
            # Only here is the table of shards read: the others learn where the segment ends.
            segment = plan_segment(feed, placement, step)
            opened = split_segment(feed, placement, segment), segment
        iterators, segment = broadcast_from_rank_zero(opened)
        return Opened(blocks_of(iterators[rank]), segment.stop_step, segment.open_next_at)

    return open_segment


def _validation_loader(job: Job, placement: Placement, rank: int) -> Loader:
    index = read_data(job.config.data)
    num_workers = ray.train.get_context().get_world_size()
    feed = feeds.evaluation_feed(
        job.config,
        index,
        split="val",
        passes=job.config.train.max_epochs,
        num_workers=num_workers,
    )
    return _loader(feed, job, index, placement, rank=rank, step=0)


class _Batches(pl.LightningDataModule):
    """Hands Lightning one epoch at a time: what is left of the current one."""

    def __init__(self, recorder: Recorder, loader: Loader, validation: Loader | None) -> None:
        super().__init__()
        self._recorder = recorder
        self._loader = loader
        self._validation = validation

    def train_dataloader(self) -> Pass:
        """Return the batches from the next step to the end of its epoch."""
        return self._loader.take(self._recorder.steps_left_in_epoch)

    def val_dataloader(self) -> Pass | list[Any]:
        """Return one pass over the validation split."""
        return [] if self._validation is None else self._validation.take(1)


def _trainer(job: Job, recorder: Recorder, loader: Loader, precision: Choice) -> pl.Trainer:
    config = job.config
    callbacks: list[pl.Callback] = [recorder]
    if config.train.early_stopping is not None:
        stopping = dataclasses.asdict(config.train.early_stopping)
        # Before the recorder, so that a commit holds its count of this validation.
        # Not strict: the recorder says in one sentence that its metric was never logged.
        callbacks.insert(0, EarlyStopping(**stopping, check_on_train_epoch_end=False, strict=False))

    def loss_weight() -> float:
        assert loader.current is not None
        return loader.current.weight

    # Not "auto": a worker that reserved no GPU may still see those of its machine.
    device = ray.train.torch.get_device()
    trainer = pl.Trainer(
        accelerator=device.type,
        devices="auto",
        strategy=build_strategy(
            job.strategy, loss_weight, device, offload=config.train.offload_optimizer
        ),
        plugins=[RayLightningEnvironment()],
        precision=lightning_precision(precision.value),
        max_epochs=config.train.max_epochs,
        accumulate_grad_batches=loader.batching.accumulation,
        gradient_clip_val=config.train.gradient_clip_norm,
        callbacks=callbacks,
        logger=TensorBoardLogger(_log_folder(job.run), name="", version=""),
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    prepared: pl.Trainer = prepare_trainer(trainer)
    return prepared


def _log_folder(run: str) -> str:
    if not storage.is_remote(run):
        return storage.join(run, "tensorboard")
    return tempfile.mkdtemp(prefix="orchestrator-tensorboard-")
