"""Worker side: for how long a worker waits for the exchange of gradients and states.

DDP exchanges beside the backward pass; what counts is the part after it. PyTorch's reducer measures
that itself (`reducer.hpp`, `logger.cpp`, 2.14): from the end of the backward pass to the end of the
last bucket. On CPUs it measures every step, which costs nothing that could be measured (of 3.6 ms
of CPU a step, medians of 250 steps with and without in turns: 3.66, 3.65, 3.62 against 3.66, 3.64,
3.64); on CUDA every hundredth, by events, as reading them waits for the step before.

DeepSpeed calls collectives through one object, whose calls and waits are timed; on CUDA, where they
return before they are done, they are not.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch.nn.parallel import DistributedDataParallel

from orchestrator.train.timing.timeline import Timeline

_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "barrier",
)


class Exchange(Protocol):
    """Brings a timeline's communication up to date."""

    def settle(self) -> None:
        """Count what is known by now."""


def exchange_of(strategy: Any, timeline: Timeline) -> Exchange | None:
    """Return what measures the exchange of a strategy that has been set up, if anything must."""
    if hasattr(strategy, "deepspeed_engine"):
        if strategy.root_device.type == "cpu":
            time_collectives(timeline)
        return None
    if not isinstance(strategy.model, DistributedDataParallel):
        return None
    return ReducerExchange(strategy.model, timeline, on_cpu=strategy.root_device.type == "cpu")


class ReducerExchange:
    """What DDP's reducer measured.

    Args:
        model: the DistributedDataParallel module.
        timeline: of its worker.
        on_cpu: whether it is cheap to measure each step.
    """

    def __init__(self, model: Any, timeline: Timeline, *, on_cpu: bool) -> None:
        self._model = model
        self._timeline = timeline
        self._counted_s = 0.0
        if on_cpu:
            model._set_ddp_runtime_logging_sample_rate(1)

    def settle(self) -> None:
        """Count the exchanges of all steps but the last; their mean where not all are measured."""
        found = self._model._get_ddp_logging_data()
        exposed = found.get("avg_backward_comm_time", 0) - found.get(
            "avg_backward_compute_comm_overlap_time", 0
        )
        total_s = max(0.0, 1e-9 * exposed * found.get("iteration", 0))
        # The mean of a few steps may fall; what was counted stays.
        new = min(total_s - self._counted_s, self._timeline.seconds["forward_backward"])
        if new > 0:
            self._timeline.move(new, source="forward_backward", to="communication")
            self._counted_s += new


def time_collectives(timeline: Timeline) -> None:
    """Let DeepSpeed's collectives, and waiting for those begun, run as communication."""
    from deepspeed.comm import comm

    for name in _COLLECTIVES:
        call = getattr(comm.cdb, name)
        # An earlier training in this process may have wrapped it.
        call = call.call if isinstance(call, _Timed) else call
        setattr(comm.cdb, name, _Timed(call, timeline))


class _Timed:
    """A collective that is begun, and ends unless it is asynchronous."""

    def __init__(self, call: Callable[..., Any], timeline: Timeline) -> None:
        self.call = call
        self._timeline = timeline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self._timeline.enter("communication")
        try:
            work = self.call(*args, **kwargs)
        finally:
            self._timeline.enter(before)
        return _TimedWork(work, self._timeline) if hasattr(work, "wait") else work


class _TimedWork:
    """A collective that was begun."""

    def __init__(self, work: Any, timeline: Timeline) -> None:
        self._work = work
        self._timeline = timeline

    def wait(self, *args: Any) -> Any:
        before = self._timeline.enter("communication")
        try:
            return self._work.wait(*args)
        finally:
            self._timeline.enter(before)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
