"""Driver side: check a run, start Ray Train's workers, and write down how it ended."""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
import uuid
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from orchestrator import cluster, progress, storage
from orchestrator.config import Config, DataConfig, UserError
from orchestrator.data.source import Placement
from orchestrator.data.sources import read_data
from orchestrator.run import (
    RESULT_FILE,
    append_event,
    check_same_run,
    open_run,
    run_uri,
)
from orchestrator.train import preflight, resuming
from orchestrator.train.entry import run_worker
from orchestrator.train.errors import Diverged
from orchestrator.train.job import Job
from orchestrator.train.outcome import close_diverged, close_failed, close_run, result_of
from orchestrator.train.recovery.again import fit_again
from orchestrator.train.recovery.elastic import RunTrainer
from orchestrator.train.recovery.mistakes import FailurePolicy, GaveUp
from orchestrator.train.recovery.preemptions import NotePreemptions
from orchestrator.train.recovery.shrink import RememberMemory
from orchestrator.train.saving import lease
from orchestrator.train.saving.lease import Lease
from orchestrator.train.saving.rewinding import clear_unfinished
from orchestrator.train.strategies import choose
from orchestrator.train.strategies.capacity import Memory, check_memory
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.timing.startup import Startup
from orchestrator.train.validation import beside
from orchestrator.train.validation.settle import settle

ERROR_FILE = "error.txt"
# Environment variable; see `Job.resize_every_s`.
RESIZE_EVERY = "ORCHESTRATOR_RESIZE_EVERY_S"


class TrainingFailed(RuntimeError):
    """Training ended by an error of the code or the cluster; the trace is in `error.txt`."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run: str
    """URI of the run's folder."""
    result: dict[str, Any]
    """What `result.json` holds."""

    @property
    def stop_reason(self) -> str:
        """converged, max_epochs or diverged."""
        return str(self.result["stop_reason"])

    @property
    def best(self) -> dict[str, Any]:
        """Metrics of the best checkpoint, with its step and epoch."""
        return dict(self.result["best"])


def check(config: Config) -> Choice:
    """Check all that can be checked without Ray; nothing is written.

    Raises:
        UserError: one sentence with the field or URI, the rule, the value and the remedy.
    """
    preflight.check_config(config)
    index = preflight.check_data(config)
    preflight.check_model(config, index)
    choose.check_hardware(config)
    check_same_run(config)
    resumed = resuming.check_checkpoints(config, index, run_uri(config))
    return choose.choose_strategy(config, num_classes=len(index.classes), resumed=resumed)


def fit(
    config: Config,
    *,
    verbose: bool = False,
    callbacks: Sequence[ray.train.UserCallback] = (),
    show: bool = True,
    share: int = 1,
    startup: Startup | None = None,
) -> RunResult:
    """Train, or go on with, the run that `config` describes, to its end.

    Args:
        config: the run.
        verbose: show Ray's own log lines.
        callbacks: told of every report, in Ray Train's controller.
        show: print progress.
        share: runs that divide the cluster between them, as the trials of a sweep do.
        startup: the phases of the start so far; None: it begins here.

    Raises:
        UserError: the config cannot work; nothing was started.
        Diverged: a loss or the weights became NaN or infinite.
        TrainingFailed: training ended by an error; the run can be resubmitted.
    """
    startup = startup or Startup(time.time())
    preflight.check_config(config)
    config = dataclasses.replace(config, data=absolute(config.data))
    strategy = check(config)
    run = run_uri(config)
    if preflight.is_finished(config, run):
        lease.clear(run)
        return RunResult(run, result_of(run, config))
    with lease.held(run) as mine:
        return _fit(
            config,
            strategy,
            run,
            mine,
            verbose=verbose,
            callbacks=callbacks,
            show=show,
            share=share,
            startup=startup,
        )


def _fit(
    config: Config,
    strategy: Choice,
    run: str,
    mine: Lease,
    *,
    verbose: bool,
    callbacks: Sequence[ray.train.UserCallback],
    show: bool,
    share: int,
    startup: Startup,
) -> RunResult:
    startup.mark("checks")
    cluster.connect(verbose=verbose)
    # Ray Train's controller waits for this actor, once it has itself started: 1 s each.
    get_or_create_autoscaling_coordinator()
    startup.mark("ray")
    resources = preflight.cluster_resources()
    preflight.check_resources(config, resources, may_grow=cluster.may_grow())
    _check_memory(config, share=share)
    open_run(config)
    clear_unfinished(run)
    storage.delete_file(storage.join(run, RESULT_FILE))  # of an earlier end: this one goes on
    workers = config.scaling.num_workers  # a list where it is elastic
    append_event(run, "submitted", workers=workers, cpus=resources.cpus, gpus=resources.gpus)
    with _board(show=show) as board, beside.process(run, config, board) as apart:
        waiting = preflight.describe_waiting(config, resources)
        if waiting:
            board.say.remote(waiting)
        job = Job(
            run=run,
            config=config,
            strategy=strategy,
            lease="",
            share=share,
            may_grow=cluster.may_grow(),
            board=board,
            import_paths=cluster.import_paths(),
            resize_every_s=float(os.environ.get(RESIZE_EVERY, Job.resize_every_s)),
            startup=startup,
            validation=apart.handle if apart else None,
        )
        with _closed_where_it_diverged(run, config), _explained(config, run, mine):
            if not preflight.is_trained(config, run):
                fit_again(job, mine, lambda now: _run_trainer(now, callbacks=callbacks))
        settle(run, config, apart, board)
    return RunResult(run, close_run(run, config))


def _check_memory(config: Config, *, share: int) -> None:
    if cluster.may_grow():
        return  # what it will have is not known yet
    found, scaling = ray.cluster_resources(), config.scaling
    placement = Placement.choose(
        requested=config.data.decode_slots,
        cluster_cpus=found.get("CPU", 0),
        worker_cpus=config.reserved_cpus(scaling.max_workers) * share,
        share=share,
    )
    memory = Memory(int(found.get("memory", 0)), int(found.get("object_store_memory", 0)))
    check_memory(config, read_data(config.data), memory, slots=placement.slots)


def absolute(data: DataConfig) -> DataConfig:
    """Name the data such that every process of the cluster finds it."""
    parts = tuple(
        dataclasses.replace(part, index=storage.absolute(part.index)) for part in data.mix
    )
    index = storage.absolute(data.index) if data.index else ""
    return dataclasses.replace(data, index=index, mix=parts)


@contextlib.contextmanager
def _board(*, show: bool) -> Any:
    board = progress.start_board()
    try:
        with progress.display(board, stream=sys.stderr) if show else contextlib.nullcontext():
            yield board
    finally:
        ray.kill(board)


def _run_trainer(job: Job, *, callbacks: Sequence[ray.train.UserCallback]) -> None:
    filesystem, path = storage.arrow_filesystem(storage.join(job.run, "ray"))
    # The controller takes one report a poll: at Ray's 2 s, no epoch would be shorter than that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # At Ray's 5 s, a sixth of a 30 s notice would be gone before the controller knew.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(job.config.train.hang_timeout_s)
    trainer = RunTrainer(
        run_worker,
        # As bytes: the controller would import Lightning (8 s) only to hand the job on.
        train_loop_config={"job": cloudpickle.dumps(job), "startup": job.startup},
        scaling=job.config.scaling,
        board=job.board,
        run_config=ray.train.RunConfig(
            # Our own checkpoints are the only state: a name of its own for each start keeps Ray's
            # snapshot file, which a crash can tear, out of a resume.
            name=f"start-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            # Our own policy counts, and ends the run.
            failure_config=ray.train.FailureConfig(max_failures=-1),
            callbacks=[
                FailurePolicy(job.run, job.lease, job.board, job.config.train),
                NotePreemptions(job.run, job.board),
                RememberMemory(job.run, job.board, job.config),
                *callbacks,
            ],
        ),
    )
    try:
        trainer.fit()
    finally:
        with contextlib.suppress(storage.StorageError):  # it must not hide how training ended
            storage.delete_folder(storage.join(job.run, "ray"))


@contextlib.contextmanager
def _closed_where_it_diverged(run: str, config: Config) -> Any:
    """Write the result of a run that diverged, and name the checkpoint it can be gone on from."""
    try:
        yield
    except Diverged as error:
        raise close_diverged(run, config, error) from error


@contextlib.contextmanager
def _explained(config: Config, run: str, mine: Lease) -> Any:
    """Turn what Ray raises into the worker's own error: one line, the trace in a file."""
    try:
        yield
    except (ray.train.TrainingFailedError, GaveUp) as error:
        cause = cluster.root_cause(error)
        trace = "".join(traceback.format_exception(error))
        line = f"{type(cause).__name__}: {cluster.sentence(cause)}"
        if isinstance(cause, GaveUp):
            trace, line = cause.trace, cause.sentence
        with contextlib.suppress(UserError):  # storage may be what failed
            _write_down(config, run, mine, line, trace, diverged=isinstance(cause, Diverged))
        if isinstance(cause, UserError):
            kind = Diverged if isinstance(cause, Diverged) else UserError
            raise kind(cluster.sentence(cause)) from error
        raise TrainingFailed(
            f"training failed: {line} (trace: {storage.join(run, ERROR_FILE)}); submit the same "
            "command again to go on from the last checkpoint."
        ) from error


def _write_down(
    config: Config, run: str, mine: Lease, line: str, trace: str, *, diverged: bool
) -> None:
    storage.write_atomic(storage.join(run, ERROR_FILE), trace.encode())
    append_event(run, "failed", error=line)
    if not diverged:
        mine.renew()  # the run is ours to close, and a worker that is left commits no more
        close_failed(run, config, line)
