"""Driver side: which strategy a run uses, by what its model needs and its workers' memory holds."""

import dataclasses
import os
from pathlib import Path

import torch

from orchestrator.config import Config, ScalingConfig, UserError
from orchestrator.train.strategies import memory
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.strategies.memory import Need, in_words
from orchestrator.train.strategies.size import Measured, Unmeasured, measure

# The rest is for activations and what the allocator loses between blocks.
_SHARE_FOR_STATES = 0.6
# Of a node without GPUs: the other half is for reading (see capacity.py) and the page cache.
_SHARE_FOR_WORKERS = 0.5
_ALONE = "one worker has nobody to share states with"
UNDECIDED = "auto"
"""The value of a choice that only a worker can make."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What one worker has, and whose it is."""

    num_bytes: int
    said: str

    @property
    def for_states(self) -> float:
        """Bytes for weights, gradients and optimizer states; the rest is for activations."""
        return _SHARE_FOR_STATES * self.num_bytes


def device_memory(scaling: ScalingConfig) -> DeviceMemory | None:
    """Return the memory of one worker's device, or None where it is not this machine's."""
    if scaling.gpus_per_worker > 0:
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
        each = int(min(1.0, scaling.gpus_per_worker) * properties.total_memory)
        return DeviceMemory(each, f"a {properties.name} with {in_words(each)}")
    cpus = os.cpu_count() or 1
    workers = max(1, min(scaling.max_workers, int(cpus // scaling.cpus_per_worker)))
    each = int(_SHARE_FOR_WORKERS * _node_memory() / workers)
    return DeviceMemory(
        each, f"{in_words(each)}, half of a machine like this one between {workers} workers"
    )


def _node_memory() -> int:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return min(installed, int(limit)) if limit.isdecimal() else installed


def check_hardware(config: Config) -> None:
    """Hold what is asked for against what the workers have.

    Raises:
        UserError: the optimizer cannot be offloaded.
    """
    if not config.train.offload_optimizer:
        return
    if config.scaling.gpus_per_worker == 0:
        raise UserError(
            "train.offload_optimizer=true moves optimizer states from GPUs to the nodes' memory, "
            "where they are already with scaling.gpus_per_worker=0; leave it out."
        )
    if config.train.strategy == "ddp":
        raise UserError(
            "train.offload_optimizer=true needs ZeRO but train.strategy='ddp'; set train.strategy "
            "to zero2, or to auto."
        )


def choose_strategy(config: Config, *, num_classes: int, resumed: str | None = None) -> Choice:
    """Return ddp or zero1 to zero3: what is asked for, or the simplest whose states fit.

    It is `UNDECIDED` where only the workers know how much memory they have; see `choose_here`.

    Args:
        config: the run.
        num_classes: classes of its data.
        resumed: the strategy of the checkpoint that the run goes on from.

    Raises:
        UserError: the module cannot be trained with the strategy asked for.
    """
    requested, offload = config.train.strategy, config.train.offload_optimizer
    if requested == "auto" and resumed is not None:
        return _gone_on(config, resumed)
    alone = config.scaling.max_workers == 1 and not offload
    if requested == "ddp" or (requested == "auto" and alone):
        return Choice("ddp", "asked for" if requested == "ddp" else _ALONE)
    try:
        measured = measure(config.model, num_classes=num_classes)
    except Unmeasured as error:
        if requested == "auto":
            return Choice(_simplest_of(config)[0], f"{error}, so that what it needs is not known")
        return Choice(requested, f"asked for; {error}, so that nothing else was checked")
    if requested == "auto":
        return simplest(config, measured)
    _refuse(f"train.strategy={requested!r}", measured)
    return Choice(requested, "; ".join(filter(None, ["asked for", measured.doubt])))


def choose_here(config: Config, *, num_classes: int) -> Choice:
    """Worker side: decide by this worker's own GPU what the driver left `UNDECIDED`."""
    choice = choose_strategy(config, num_classes=num_classes)
    if choice.value != UNDECIDED:
        return choice
    return Choice(_simplest_of(config)[0], "worker 0 sees no GPU, so that its memory is not known")


def _gone_on(config: Config, resumed: str) -> Choice:
    if config.train.offload_optimizer and resumed == "ddp":
        raise UserError(
            "train.offload_optimizer=true needs ZeRO but the run's checkpoint is of ddp, whose "
            "optimizer states ZeRO does not load; leave it out, or give the run another --name."
        )
    return Choice(resumed, "as before the resume")


def _simplest_of(config: Config) -> tuple[str, ...]:
    """Return the strategies that a config leaves to `auto`, the simplest first."""
    return memory.STRATEGIES[1:] if config.train.offload_optimizer else memory.STRATEGIES


def _refuse(asked: str, measured: Measured) -> None:
    if measured.hindrance:
        raise UserError(f"{asked}: {measured.hindrance}; set train.strategy to ddp.")


def simplest(config: Config, measured: Measured) -> Choice:
    """Return the first of ddp, zero1, zero2 and zero3 whose states fit a worker's device.

    Raises:
        UserError: the optimizer is to be offloaded, but the module cannot be trained with ZeRO.
    """
    offload = config.train.offload_optimizer
    if config.scaling.max_workers == 1 and not offload:
        return Choice("ddp", _ALONE)
    if offload:
        _refuse("train.offload_optimizer=true needs ZeRO", measured)
    elif measured.hindrance or measured.doubt:
        return Choice("ddp", measured.hindrance or f"{measured.doubt}, which ZeRO might not share")
    found = device_memory(config.scaling)
    if found is None:
        return Choice(UNDECIDED, "the workers' GPUs decide: there is none here")
    needs = needs_of(config, measured)
    limit = f"{in_words(found.for_states)}, {_SHARE_FOR_STATES:.0%} of {found.said}"
    said = [measured.doubt] if measured.doubt else []
    for strategy in _simplest_of(config):
        said.append(f"{strategy} takes {in_words(needs[strategy].total)} a worker")
        if needs[strategy].total <= found.for_states:
            return Choice(strategy, f"{'; '.join(said)} for states, of {limit}")
    return Choice(memory.STRATEGIES[-1], "; ".join([*said, f"none fits {limit}"]))


def needs_of(
    config: Config, measured: Measured, *, num_workers: int | None = None
) -> dict[str, Need]:
    """Return what a worker needs under each strategy, at the config's fewest workers or others.

    Where the precision is measured later (auto on a CPU), fp32 is assumed: it needs the most.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if config.scaling.gpus_per_worker > 0 else "32"
    return {
        strategy: memory.need(
            measured.size,
            strategy,
            precision=precision,
            num_workers=num_workers or config.scaling.min_workers,
            offload=config.train.offload_optimizer,
        )
        for strategy in memory.STRATEGIES
    }
