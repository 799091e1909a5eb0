"""Driver side: what a run would do and hold, from its config alone; nothing is started."""

import dataclasses
import os

from orchestrator.config import Config
from orchestrator.data.feeds import training_feed
from orchestrator.data.index import Index
from orchestrator.data.source import Placement
from orchestrator.data.sources import read_data
from orchestrator.run import read_events, run_uri
from orchestrator.train import launch, memory_limits
from orchestrator.train.recovery.notice import NOTICE_MARGIN, NOTICE_S, Interval
from orchestrator.train.strategies import choose
from orchestrator.train.strategies.capacity import held_by_reading
from orchestrator.train.strategies.memory import in_words
from orchestrator.train.strategies.size import Measured, Unmeasured, measure

WORLD_SIZES = (1, 2, 4, 8, 16)


def describe(config: Config) -> str:
    """Return a page of Markdown: memory by strategy, steps by number of workers, reading.

    Raises:
        UserError: the config cannot work, as `orchestrator train` would say.
    """
    config = dataclasses.replace(config, data=launch.absolute(config.data))
    choice = launch.check(config)
    index = read_data(config.data)
    limits = memory_limits.limits_of(read_events(run_uri(config)), config)
    config = memory_limits.limited(config, limits)
    held = [f"{memory_limits.describe(limits)}.", ""] if limits else []
    measured: Measured | None = None
    try:
        measured = measure(config.model, num_classes=len(index.classes))
        memory = _memory(config, measured, choice.value)
    except Unmeasured as error:
        memory = [f"Its memory is not known beforehand: {error}."]
    return "\n".join(
        [
            *(f"# {config.name}", "", _steps(config, index), ""),
            *(*memory, f"Strategy {choice}.", ""),
            *(*_worlds(config, index, measured), "", *held, _reading(config, index)),
        ]
    )


def _steps(config: Config, index: Index) -> str:
    samples, batch = index.splits["train"].samples, config.data.global_batch
    steps = -(-samples * config.train.max_epochs // batch)
    return (
        f"{samples:,} training images in steps of {batch:,} samples at any number of workers: "
        f"{samples / batch:,.1f} steps an epoch, {steps:,} in {config.train.max_epochs} epochs."
    )


def _memory(config: Config, measured: Measured, strategy: str) -> list[str]:
    size, found = measured.size, choose.device_memory(config.scaling)
    rows = []
    for name, need in choose.needs_of(config, measured).items():
        parts = (need.parameters, need.gradients, need.optimizer, need.work, need.total)
        fits = "?" if found is None else "yes" if need.total <= found.for_states else "no"
        if need.host:
            fits += f", {in_words(need.host)} on the node"
        rows.append((name, *(in_words(part) for part in parts), fits))
    limit = "fits" if found is None else f"fits {in_words(found.for_states)}"
    columns = ("strategy", "weights", "gradients", "optimizer", "buffers", "a worker", limit)
    return [
        f"{config.model.class_path.rpartition('.')[2]}: {size.parameters:,} parameters, of which "
        f"{size.optimizer} trains {size.trainable:,}, on {config.scaling.min_workers} workers "
        "(activations come on top):",
        "",
        *_table(columns, rows),
        "",
        _checkpoint(config, measured, strategy),
    ]


def _checkpoint(config: Config, measured: Measured, strategy: str) -> str:
    # All workers' shares together are what one worker alone would hold.
    sharded = strategy.startswith("zero") or config.train.offload_optimizer
    name = "zero1" if sharded else "ddp"
    # What is offloaded beside the states, such as gradients, is not saved.
    train = dataclasses.replace(config.train, offload_optimizer=False)
    resident = dataclasses.replace(config, train=train)
    need = choose.needs_of(resident, measured, num_workers=1)[name]
    states = need.optimizer
    rate = NOTICE_MARGIN * (need.parameters + states) / NOTICE_S
    return (
        f"A checkpoint takes{f' under {name}' if strategy == choose.UNDECIDED else ''} "
        f"{in_words(need.parameters + states)}: {in_words(need.parameters)} of weights, "
        f"{in_words(states)} of optimizer states, and as much of the nodes' memory for copies; the "
        f"last {config.train.checkpoint.keep} and the best one are kept. "
        f"{_slow_save(config) or f'One made at a notice of {NOTICE_S:.0f} s fits it'}"
        f" where the workers together write {in_words(rate)} a second."
    )


def _slow_save(config: Config) -> str:
    """Return what an earlier start of the run has measured, where that was too slow."""
    said = [event for event in read_events(run_uri(config)) if event["event"] == "slow_save"]
    if not said:
        return ""
    interval = Interval(said[-1]["every_steps"], said[-1]["is_lowered"])
    return (
        f"It took {said[-1]['save_s']:g} s to be saved, so that one made at a notice will not fit "
        f"in {NOTICE_S:.0f} s; periodic interval {interval.words}; it would fit"
    )


def _worlds(config: Config, index: Index, measured: Measured | None) -> list[str]:
    scaling, rows = config.scaling, []
    own = {
        scaling.max_workers: "this run, at most" if scaling.is_elastic else "this run",
        scaling.min_workers: "this run, at least" if scaling.is_elastic else "this run",
    }
    for workers in sorted({*WORLD_SIZES, *own}):
        if workers > config.data.global_batch:
            break
        fixed = dataclasses.replace(scaling, num_workers=workers)
        there = dataclasses.replace(config, scaling=fixed)
        batching = training_feed(there, index, num_workers=workers).batching
        row = [f"{workers} ({own[workers]})" if workers in own else str(workers)]
        row += [str(-(-config.data.global_batch // batching.micro_batches))]
        row += [str(batching.accumulation)]
        if measured is not None:
            taken = choose.simplest(there, measured).value
            need = choose.needs_of(there, measured).get(taken)
            row += [taken, in_words(need.total)] if need else ["?", "?"]
        rows.append(tuple(row))
    columns = ("workers", "micro-batch", "accumulation", "auto takes", "a worker")
    return _table(columns[: len(rows[0])], rows)


def _reading(config: Config, index: Index) -> str:
    scaling = config.scaling
    placement = Placement.choose(
        requested=config.data.decode_slots,
        cluster_cpus=os.cpu_count() or 1,
        worker_cpus=config.reserved_cpus(scaling.max_workers),
    )
    held = held_by_reading(config, index, slots=placement.slots)
    return (
        f"{placement.slots} read tasks at once ({placement.reason}) hold "
        f"{in_words(held.windows)} of encoded images, in windows of {in_words(held.window)}, and "
        f"{in_words(held.blocks)} of pixels in the object store."
    )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table whose columns line up in a terminal too."""
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, tuple("-" * width for width in widths), *rows]
    return [
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in lines
    ]
