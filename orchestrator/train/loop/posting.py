"""Worker side: rank 0 tells the progress board where the run is."""

import time

from orchestrator.data.plan import Batching
from orchestrator.progress import Progress
from orchestrator.train.saving.journal import RunFacts
from orchestrator.train.timing.pace import Pace

_POST_EVERY_S = 0.5


class Poster:
    """Posts to the board, at most twice a second unless told to post now."""

    def __init__(self, facts: RunFacts, batching: Batching, pace: Pace) -> None:
        self._facts = facts
        self._batching = batching
        self._pace = pace
        self._posted = 0.0

    def post(
        self, phase: str, *, step: int, epoch: int, loss: float | None, now: bool = False
    ) -> None:
        """Post where the run is."""
        moment = time.perf_counter()
        if moment - self._posted < _POST_EVERY_S and not now:
            return
        self._posted = moment
        config, batching, rate = self._facts.config, self._batching, self._pace.steps_per_s(step)
        progress = Progress(
            phase=phase,
            run=config.name,
            step=step,
            steps=batching.num_steps,
            epoch=epoch,
            epochs=config.train.max_epochs,
            loss=loss,
            images_per_s=rate * batching.step_samples or None,
            wait_share=self._pace.wait_share,
            eta_s=(batching.num_steps - step) / rate if rate else None,
        )
        self._facts.board.post.remote(progress)
