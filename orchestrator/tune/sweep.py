"""Driver side: a sweep over `tune.space`; one trial is the config with a point's overrides."""

import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.tune
from ray.tune.error import TuneError

from orchestrator import cluster, storage
from orchestrator.config import Config, TuneConfig, UserError
from orchestrator.run import append_event, check_same_run, open_run, run_uri
from orchestrator.train import launch, preflight
from orchestrator.tune import results, space
from orchestrator.tune.mailbox import start_mailbox
from orchestrator.tune.results import Earlier, Ledger, Row, SweepResult, format_table
from orchestrator.tune.rungs import Rungs
from orchestrator.tune.schedulers import EarlyStoppingAsha
from orchestrator.tune.trial import Plan, run_trial

__all__ = ["SweepResult", "format_table", "search"]


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def search(
    config: Config, *, verbose: bool = False, say: Callable[[str], None] = _to_stderr
) -> SweepResult:
    """Run, or go on with, the sweep that `config.tune` describes.

    Args:
        config: what all trials have in common, and the `tune` section.
        verbose: show Ray's own log lines.
        say: shows a line to a person.

    Raises:
        UserError: the sweep cannot work, or its folder belongs to another one.
    """
    preflight.check_config(config)
    config = _absolute(config)
    tune = space.check_tune(config)
    points = space.points(config)
    configs = [space.trial_config(config, p, trial=i) for i, p in enumerate(points)]
    sweep = run_uri(config)
    check_same_run(config)
    earlier = results.read_sweep(sweep)
    rows = [
        Row(trial=i, overrides=point, run=run_uri(trial))
        for i, (point, trial) in enumerate(zip(points, configs, strict=True))
    ]
    if earlier is not None:
        rows = _kept(earlier, rows, tune, sweep)
    ledger = Ledger(sweep, tune, rows, say, wall_s=earlier.wall_s if earlier else 0.0)
    if ledger.result.finished:
        say(f"{sweep} holds this sweep, finished; nothing is trained again.")
        return ledger.result
    for trial in configs:
        launch.check(trial)
    cluster.connect(verbose=verbose)
    concurrent = _count_concurrent(tune, configs, say)
    open_run(config)
    append_event(sweep, "sweep", trials=len(rows), concurrent=concurrent)
    ledger.write()
    _run_trials(ledger, tune, configs, concurrent=concurrent, verbose=verbose)
    ledger.write()
    results.write_outcome(ledger.result, config)
    return ledger.result


def _absolute(config: Config) -> Config:
    """Make paths mean the same in every process, whatever its folder."""
    data = dataclasses.replace(config.data, index=storage.absolute(config.data.index))
    return dataclasses.replace(
        config, data=data, storage_path=storage.absolute(config.storage_path)
    )


def _kept(earlier: Earlier, rows: list[Row], tune: TuneConfig, sweep: str) -> list[Row]:
    """Return the rows with what an earlier start of this sweep left of them."""
    for key in ("metric", "mode"):
        if earlier.tune[key] != getattr(tune, key):
            raise _foreign(sweep, f"tune.{key}", earlier.tune[key], getattr(tune, key))
    kept = list(rows)
    for was, row in zip(earlier.rows, rows, strict=False):
        if was.overrides != row.overrides:
            raise _foreign(sweep, f"trial {row.trial}", was.overrides, row.overrides)
        # A failure may be mended by now, and a trial that did not end goes on from its run.
        if was.reason not in (None, "failed"):
            kept[row.trial] = dataclasses.replace(was, run=row.run)
    return kept


def _foreign(sweep: str, key: str, was: Any, now: Any) -> UserError:
    return UserError(
        f"{sweep} belongs to another sweep: {key} was {was!r} and is now {now!r}; give this sweep "
        "another --name, or take the change back."
    )


def _count_concurrent(
    tune: TuneConfig, configs: Sequence[Config], say: Callable[[str], None]
) -> int:
    """Return how many trials run at once: no more than the workers of as many find a place.

    Raises:
        UserError: not even one does.
    """
    found, may_grow = preflight.cluster_resources(), cluster.may_grow()
    for config in configs:
        preflight.check_resources(config, found, may_grow=may_grow)
    needs = [
        (max(c.reserved_cpus(c.scaling.max_workers) for c in configs), found.cpus),
        (max(c.reserved_gpus(c.scaling.max_workers) for c in configs), found.gpus),
    ]
    fits = min((int(has / need) for need, has in needs if need > 0), default=len(configs))
    asked = tune.max_concurrent_trials
    if asked is not None and asked > fits and not may_grow:
        say(
            f"tune.max_concurrent_trials={asked} is lowered to {fits}: the workers of more do not "
            "fit this cluster."
        )
    limit = fits if asked is None else asked if may_grow else min(asked, fits)
    return min(len(configs), max(1, limit))


def _run_trials(
    ledger: Ledger, tune: TuneConfig, configs: Sequence[Config], *, concurrent: int, verbose: bool
) -> None:
    rungs = _rungs(tune, ledger.result.rows)
    mailbox = start_mailbox()
    schedule = EarlyStoppingAsha(rungs=rungs, ledger=ledger, mailbox=mailbox)
    plan = Plan(
        configs=tuple(configs),
        concurrent=concurrent,
        mailbox=mailbox,
        import_paths=cluster.import_paths(),
    )
    left = [row.trial for row in ledger.result.rows if row.reason is None]
    with tempfile.TemporaryDirectory(prefix="orchestrator-tune-") as scratch:
        tuner = _tuner(plan, schedule, left, scratch=scratch, verbose=verbose)
        try:
            tuner.fit()
        except TuneError as error:
            if schedule.problem is not None:
                raise schedule.problem from error
            raise
        finally:
            ray.kill(mailbox)
    for trial in left:
        ledger.end(trial, "failed", "its process ended without a word")


def _rungs(tune: TuneConfig, rows: Sequence[Row]) -> Rungs | None:
    """Return the rungs as the trials that already ended left them."""
    if tune.scheduler == "none":
        return None
    rungs = Rungs(
        grace_epochs=tune.grace_epochs, reduction_factor=tune.reduction_factor, mode=tune.mode
    )
    for row in rows:
        if row.reason is not None:
            for epochs, value in row.curve:
                rungs.record(row.trial, epochs=epochs, value=value)
            rungs.finish(row.trial, row.reason)
    return rungs


def _tuner(
    plan: Plan, schedule: EarlyStoppingAsha, trials: list[int], *, scratch: str, verbose: bool
) -> ray.tune.Tuner:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    if not verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its banner ignores verbose=0
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Ctrl-C ends the sweep as it ends any program; what trials committed stays.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # A trial's function computes nothing. It lives on this node, which outlives spot workers.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    return ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(run_trial, plan=plan), here),
        param_space={"trial": ray.tune.grid_search(trials)},
        tune_config=ray.tune.TuneConfig(
            scheduler=schedule,
            max_concurrent_trials=plan.concurrent,
            # The next trial finds a process that has imported torch and Lightning: 8 s of CPU.
            reuse_actors=True,
        ),
        # Tune's own records are scratch: sweep.json and the runs' folders hold all that counts.
        run_config=ray.tune.RunConfig(name="sweep", storage_path=scratch, verbose=int(verbose)),
    )
