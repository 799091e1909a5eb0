"""Worker side: the function that every Ray Train worker runs."""

import contextlib
import dataclasses
import logging
import time
import warnings
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import ray.util
from ray import cloudpickle
from ray.train.collective import broadcast_from_rank_zero

from orchestrator import cluster, storage
from orchestrator.config import UserError
from orchestrator.data import feeds
from orchestrator.data.sources import read_data
from orchestrator.run import CONFIG_FILE, append_event, read_events
from orchestrator.train import feeding, memory_limits
from orchestrator.train.job import Job
from orchestrator.train.recovery import elastic, failures
from orchestrator.train.saving import checkpoint, groups, lease
from orchestrator.train.saving.rewinding import rewind
from orchestrator.train.saving.staging import Staging
from orchestrator.train.timing.startup import Startup, importing

# Between tries to see what worker 0 sees: NFS may take a minute to look again.
_PAUSES_S = (1.0, 4.0, 15.0, 45.0)


def train_worker(pickled: bytes, startup: Startup) -> None:
    """Train until the run converges or reaches its last epoch; resume where it was committed."""
    job: Job = dataclasses.replace(cloudpickle.loads(pickled), startup=startup)
    with failures.portable():
        _train(job)


def _train(job: Job) -> None:
    _prepare_process(job)
    job = _fitting(job)
    # After a first exchange, which workers of an earlier group no longer get through.
    job = dataclasses.replace(job, lease=groups.token_of(job.run, job.lease))
    config, rank = job.config, ray.train.get_context().get_world_rank()
    num_workers = ray.train.get_context().get_world_size()
    index = read_data(config.data)
    with contextlib.closing(Staging()) as staging, contextlib.ExitStack() as opened:
        folder = staging.folder()
        resumed = _find_checkpoint(job, folder, rank)
        job.startup.mark("checkpoint")
        step = resumed.step if resumed else 0
        feed = feeds.training_feed(config, index, num_workers=num_workers)
        ended = resumed is not None and resumed.done not in ("", "max_epochs")
        if ended or step >= feed.batching.num_steps:
            if rank == 0 and resumed is not None and not resumed.done:
                # train.max_epochs was lowered to just what is done: nobody else says that it ends.
                checkpoint.amend(job.run, step, done="max_epochs")
            return
        elastic.refuse_drained_node(step=step)
        placement = feeding.place_readers(job)
        loader = feeding.build_loader(feed, job, index, placement, rank=rank, step=step)
        opened.callback(loader.close)
        # Before the rest: the first batch takes seconds, which pass beside it.
        loader.start()
        job.startup.mark("reading")
        with importing():
            # Lightning takes seconds: they pass beside the reading.
            from orchestrator.train.loop.training import Work, train
        job.startup.mark("worker imports")
        train(Work(job, index, feed, resumed, folder, staging, placement, loader))


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


def _fitting(job: Job) -> Job:
    """Return the job with micro-batches as small as earlier starts learnt that they must be."""
    first = ray.train.get_context().get_world_rank() == 0
    limits = memory_limits.limits_of(read_events(job.run), job.config) if first else {}
    agreed: dict[str, int] = broadcast_from_rank_zero(limits)
    return dataclasses.replace(job, config=memory_limits.limited(job.config, agreed), limits=agreed)


def _find_checkpoint(job: Job, folder: Path, rank: int) -> checkpoint.Manifest | None:
    """Fetch a checkpoint: rank 0 decides which and clears what lies beyond, the others follow."""
    found = _take_newest(job, folder) if rank == 0 else None
    step: int | None = broadcast_from_rank_zero(found.step if found else None)
    if rank == 0 or step is None:
        return found
    return _take_same(job.run, step, folder, rank)


def _take_newest(job: Job, folder: Path) -> checkpoint.Manifest | None:
    lease.check(job.run, job.lease)
    there = checkpoint.survey(job.run)
    problems, found = list(there.problems), None
    if there.manifests:
        found, damaged = checkpoint.fetch_newest(job.run, there.manifests, folder)
        problems += damaged
    step = found.step if found else 0
    lease.check(job.run, job.lease)  # fetching took a while: nothing of a later start's may go
    rewind(job.run, step)
    for problem in problems:
        append_event(job.run, "checkpoint_refused", problem=problem)
        going_on = f"going on from the checkpoint of step {step}"
        job.board.say.remote(f"{problem.rstrip('.')}; {going_on}")
    return found


def _take_same(run: str, step: int, folder: Path, rank: int) -> checkpoint.Manifest:
    pauses = iter(_PAUSES_S)
    while True:
        try:
            manifest = checkpoint.read_manifest(run, step)
            checkpoint.fetch(run, manifest, folder)
            return manifest
        except (checkpoint.CheckpointError, storage.MissingError) as error:
            if (pause_s := next(pauses, None)) is None:
                raise storage.StorageError(
                    f"worker {rank} cannot read the checkpoint of step {step} that worker 0 reads "
                    f"({error}); check that {run} is the same storage on every node."
                ) from error
            time.sleep(pause_s)
