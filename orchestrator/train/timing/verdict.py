"""What holds a run back, in one sentence, from what was measured. Pure."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from orchestrator.config import Config
from orchestrator.train.timing.measured import Measured

Kind = Literal[
    "input-bound",
    "communication-bound",
    "slow worker",
    "optimizer-bound",
    "checkpoint-bound",
    "validation-bound",
    "restart-bound",
    "overhead-bound",
    "compute-bound",
]
# A smaller loss is not worth a change, and close to what a ceiling of a few steps is off by.
_WORTH = 0.1
# A worker that computes this much longer than the others is slow; less is chance.
_SLOW = 1.25
# Pauses for checkpoints, and validations, should take no more than this share.
_AIM = 0.02
# Readers that are busy for less than this share, or for less than workers wait, are not what is
# waited for.
_IDLE = 0.4
# Of requests: more of them repeated says that storage refuses, not that it is far.
_REFUSING = 0.05
_MOST_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What holds a run back most."""

    kind: Kind
    share: float
    """Of the time since the first start-up that it takes."""
    sentence: str


def judge(measured: Measured, config: Config) -> Verdict:
    """Return what holds a run back most, and one field to change, if one would help."""
    shares = _shares(measured)
    kind = max(shares, key=lambda kind: shares[kind])
    if shares[kind] < _WORTH:
        kind = "compute-bound"
    return Verdict(kind, shares[kind], f"{kind}: {_SENTENCES[kind](measured, config)}")


def _shares(m: Measured) -> dict[Kind, float]:
    of_time = {part: m.seconds[part] / m.running_s for part in m.seconds}
    loop = m.loop_s / m.running_s
    exchange = m.of_step("exchange_s", "communication")
    waiting_for_others = max(0.0, of_time["communication"] - exchange * loop)
    is_slow = m.stats.get("slow_factor", 1.0) >= _SLOW
    shares: dict[Kind, float] = {
        "input-bound": max(m.wait_share, m.sharing) * loop,
        "communication-bound": exchange * loop + (0 if is_slow else waiting_for_others),
        "slow worker": waiting_for_others if is_slow else 0.0,
        "optimizer-bound": of_time["optimizer"],
        "checkpoint-bound": of_time["checkpoint"],
        "validation-bound": of_time["validation"],
        "restart-bound": of_time["restart"],
        "overhead-bound": of_time["other"],
    }
    return {**shares, "compute-bound": 0.0}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _nothing(why: str) -> str:
    return f"nothing in the config would help: {why}"


def _rounded(value: float) -> int:
    """Round up to one digit and zeros: a number that somebody would write."""
    unit: int = 10 ** math.floor(math.log10(max(value, 1)))
    return math.ceil(value / unit) * unit


def _input(m: Measured, config: Config) -> str:
    if m.sharing > 2 * m.wait_share and m.wait_share < _WORTH:
        lost = (
            f"reading takes {_percent(m.sharing)} of each step from the workers' CPUs"
            if m.gain
            else f"readers decode {_percent(m.decoding)} of the time on the workers' CPUs"
        )
    else:
        lost = f"{_percent(m.wait_share)} of each step waits for data"
    faster = (
        f"with data for free this run would be {m.gain:.1f}x faster"
        if m.gain
        else "how much faster it would be with data for free was not measured"
    )
    return f"{lost}; {faster}; {_input_remedy(m)}."


def _input_remedy(m: Measured) -> str:
    stats = m.stats
    factor = m.gain or 1 / max(1 - m.wait_share, 1 / _MOST_FACTOR)
    needed = max(m.slots + 1, math.ceil(m.slots * min(factor, _MOST_FACTOR)))
    raised = f"raise data.decode_slots from {m.slots} to"
    if stats.get("read_s", 0.0) > stats.get("decode_s", 0.0):
        repeated = stats.get("retries", 0.0) / max(stats.get("requests", 0.0), 1)
        if repeated > _REFUSING:
            return _nothing(
                f"storage is slow, and had {_percent(repeated)} of the requests repeated; raise "
                "what it admits, or copy the data nearer"
            )
        return f"storage is slow: {raised} {needed}, so that more chunks are fetched at once"
    if m.busy < min(_IDLE, 0.8 * m.wait_share) and m.wait_share >= _WORTH:
        return _nothing(
            f"readers are busy only {_percent(m.busy)} of the time, so it is the way from them to "
            "the workers that is slow"
        )
    if m.slots < int(m.spare_cpus):
        return f"decoding is slow: {raised} {min(needed, int(m.spare_cpus))}"
    have = (
        f"has all {m.slots} CPUs that the workers leave"
        if not m.shares_cpus
        else "shares the workers' CPUs, of which none is left"
    )
    return _nothing(
        f"decoding is slow and {have}; add nodes with CPUs, or pack the images smaller (--max-side)"
    )


def _communication(m: Measured, config: Config) -> str:
    share = _shares(m)["communication-bound"]
    lost = f"{_percent(share)} of the time is spent on exchanging gradients"
    stage = {"zero3": "zero2", "zero2": "zero1"}.get(m.strategy)
    if stage and (m.strategy == "zero3" or m.accumulation > 1):
        return f"{lost}; set train.strategy from {m.strategy} to {stage}, if the model fits then."
    if share > 0.5 and m.workers > 1:
        return f"{lost}; lower scaling.num_workers from {m.workers} to {m.workers // 2}."
    help_ = _nothing(
        "a faster network between the workers would, or a larger data.global_batch, which changes "
        "what is learnt"
    )
    return f"{lost}; {help_}."


def _slow(m: Measured, config: Config) -> str:
    factor, rank = m.stats["slow_factor"], int(m.stats["slow_rank"])
    return (
        f"worker {rank} computes {factor:.1f}x as long as the others, who wait for it "
        f"{_percent(_shares(m)['slow worker'])} of the time; "
        + _nothing("look at what else runs on its node, and whether that is of another kind")
        + "."
    )


def _optimizer(m: Measured, config: Config) -> str:
    lost = f"{_percent(_shares(m)['optimizer-bound'])} of the time goes into the optimizer's steps"
    if config.train.offload_optimizer:
        return f"{lost}; set train.offload_optimizer from true to false, if the states fit then."
    if m.workers > 1 and m.strategy == "ddp":
        return (
            f"{lost}; set train.strategy from ddp to zero1, so that each worker makes 1 of "
            f"{m.workers} parts of it."
        )
    return f"{lost}; {_nothing('an optimizer with fewer operations would')}."


def _checkpoint(m: Measured, config: Config) -> str:
    share = _shares(m)["checkpoint-bound"]
    lost = f"steps pause {_percent(share)} of the time for checkpoints"
    settings, more = config.train.checkpoint, share / _AIM
    if settings.every_steps:
        to = _rounded(settings.every_steps * more)
        return f"{lost}; raise train.checkpoint.every_steps from {settings.every_steps} to {to}."
    if settings.every_seconds and settings.every_seconds < m.running_s / max(m.epochs, 1):
        at, to = settings.every_seconds, _rounded(settings.every_seconds * more)
        return f"{lost}; raise train.checkpoint.every_seconds from {at:g} to {to}."
    return f"{lost}; {_nothing('each epoch ends with one, and these epochs are short')}."


def _validation(m: Measured, config: Config) -> str:
    share = _shares(m)["validation-bound"]
    lost = f"{_percent(share)} of the time goes into validation, while training stands still"
    settings = config.train.validate
    if settings.beside is None and m.spare_cpus >= 1:
        return f"{lost}; set train.validate.beside from null to {{cpus: 1}}."
    if settings.every_samples:
        to = _rounded(settings.every_samples * min(share / _AIM, 10))
        return f"{lost}; raise train.validate.every_samples from {settings.every_samples} to {to}."
    why = "a smaller split for validation would"
    if settings.beside is None:
        why += ", or a CPU more, for train.validate.beside"
    return f"{lost}; {_nothing(why)}."


def _restart(m: Measured, config: Config) -> str:
    lost = (
        f"{_percent(_shares(m)['restart-bound'])} of the time went into {m.restarts} restarts and "
        "into steps that were done again"
    )
    settings, each_s = config.train.checkpoint, m.seconds["restart"] / max(m.restarts, 1)
    every_s = settings.every_seconds
    if every_s and not settings.every_steps and every_s > each_s > 60:
        to = max(10, _rounded(each_s / 4))
        return f"{lost}; lower train.checkpoint.every_seconds from {every_s:g} to {to}."
    why = "events.jsonl says what failed, and each restart took"
    return f"{lost}; {_nothing(f'{why} {each_s:.0f} s')}."


def _overhead(m: Measured, config: Config) -> str:
    lost = (
        f"{_percent(_shares(m)['overhead-bound'])} of the time goes into what is done around the "
        "steps (hooks, logging, the trainer's loops)"
    )
    if m.accumulation > 1 and m.ran_out:
        return f"{lost}; {_nothing('more memory would, for larger micro-batches')}."
    if m.accumulation > 1:
        size = config.data.max_micro_batch
        return f"{lost}; raise data.max_micro_batch from {size} to {size * m.accumulation}."
    why = "a larger data.global_batch would, which changes what is learnt"
    return f"{lost}; {_nothing(why)}."


def _compute(m: Measured, config: Config) -> str:
    share = m.seconds["forward_backward"] / m.running_s
    lost = f"{_percent(share)} of the time is forward and backward, and nothing waits"
    if m.strategy.startswith("zero") and m.workers > 1 and config.scaling.gpus_per_worker:
        # See exchange.py.
        lost += " but what they exchange, which is not told apart on GPUs under ZeRO"
    free = m.spare_cpus - math.ceil(m.slots * min(1.0, m.busy))
    more = int(free / max(config.scaling.cpus_per_worker, 1e-9))
    to = min(m.workers + more, config.data.global_batch)
    if not config.scaling.gpus_per_worker and m.spare_cpus >= 1 and to > m.workers:
        return f"{lost}; raise scaling.num_workers from {m.workers} to {to}."
    return f"{lost}; {_nothing('more or faster workers would')}."


_SENTENCES: dict[Kind, Callable[[Measured, Config], str]] = {
    "input-bound": _input,
    "communication-bound": _communication,
    "slow worker": _slow,
    "optimizer-bound": _optimizer,
    "checkpoint-bound": _checkpoint,
    "validation-bound": _validation,
    "restart-bound": _restart,
    "overhead-bound": _overhead,
    "compute-bound": _compute,
}
