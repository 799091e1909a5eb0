"""Worker side: what a strategy tells a timeline."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from orchestrator.train.timing.timeline import Timeline


class Timed:
    """A Lightning strategy whose optimizer steps run as such in a timeline.

    Lightning computes loss and gradients inside of them; accumulated micro-batches, and all of
    manual optimization, it computes outside.
    """

    timeline: Timeline | None = None
    """Of this worker, once training is set up."""

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Step; computing the gradients is no part of it, clipping them is."""
        timeline = self.timeline
        if timeline is None:
            return super().optimizer_step(  # type: ignore[misc]
                optimizer, closure, *args, **kwargs
            )

        def compute() -> Any:
            timeline.enter("forward_backward")
            try:
                return closure()
            finally:
                timeline.enter("optimizer")

        before = timeline.enter("optimizer")
        try:
            return super().optimizer_step(  # type: ignore[misc]
                optimizer, compute, *args, **kwargs
            )
        finally:
            timeline.enter(before)
