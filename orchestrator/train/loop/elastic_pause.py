"""Worker side: the Lightning callback that stops a run at a notice, with a checkpoint of that step.

Its workers raise `Paused`; the controller starts as many again as there is room for, without the
drained nodes. One checkpoint for one notice: workers are not started on drained nodes again.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import ray

from orchestrator.config import ScalingConfig
from orchestrator.data.loader import Loader
from orchestrator.run import append_event, read_events
from orchestrator.train.loop.recorder import Recorder
from orchestrator.train.recovery import elastic
from orchestrator.train.recovery.notice import (
    NOTICE_S,
    Looks,
    Notice,
    Paused,
    Watch,
    drained,
    lowered,
    preempted_event,
    slow_save,
)
from orchestrator.train.saving.checkpoint import CheckpointError
from orchestrator.train.tally import gather

# How long writing down the event may hold up the next start.
_TELL_S = 5.0
# Of one commit at a notice.
_TRIES = 2


class PauseAtNotice(pl.callbacks.Checkpoint):
    """Commits and stops where a node is drained, or where there is room for more workers.

    Of Lightning's callbacks it runs last: after the recorder has counted the step.

    Args:
        recorder: counts steps and commits.
        loader: this worker's training batches.
        scaling: how many workers there may be.
        resize_every_s: seconds of training before more workers are started.
    """

    def __init__(
        self,
        recorder: Recorder,
        loader: Loader,
        scaling: ScalingConfig,
        *,
        resize_every_s: float,
    ) -> None:
        self._recorder = recorder
        self._loader = loader
        self._scaling = scaling
        self._resize_every_s = resize_every_s
        self._watch: Watch | None = None
        self._look: _Look | None = None
        self._cut: Notice | None = None
        self._said_slow = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to look, and say where the number of workers has changed."""
        nodes = gather(trainer, ray.get_runtime_context().get_node_id())
        self._looks = Looks(step=self._recorder.step)
        self._saved = self._saving
        if trainer.global_rank != 0:
            return
        self._look = _Look(nodes, self._scaling, every_s=self._resize_every_s)
        self._watch = Watch(self._look)
        resized = resized_event(read_events(self._recorder.facts.run))
        if resized is not None:
            append_event(self._recorder.facts.run, "resized", **resized)
            self._recorder.facts.board.say.remote(
                f"goes on with {resized['to']} workers in place of {resized['from']}: "
                f"{resized['reason']}"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Stop at a step's end, if worker 0 has seen a notice.

        Raises:
            Paused: on all workers, once the step is committed.
        """
        recorder, current = self._recorder, self._loader.current
        assert current is not None
        if not current.ends_step or recorder.step >= self._loader.batching.num_steps:
            return
        if trainer.should_stop:
            return  # the run ends with a commit of this step
        # A validation may open readers on worker 0's node, which takes none while it is drained.
        now = recorder.timetable.is_due(recorder.step)
        if now and self._watch is not None:
            self._watch.look()
        agree = trainer.strategy.broadcast
        notice = self._looks.hear(recorder.step, self._see, agree, now=now)
        if notice is None:
            return
        if notice.reason == "slow_save":
            self._save_more_often(notice)
        else:
            self._pause(trainer, notice)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count batches, of which all workers have equally many."""
        self._looks_between = Looks(step=0)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End the validation if worker 0 has seen that a node goes: the next start validates."""
        if self._recorder.step >= self._loader.batching.num_steps:
            return  # there is no next start: the run ends with this validation
        agree = trainer.strategy.broadcast
        self._cut = self._looks_between.hear(batch_idx + 1, self._see_drained, agree)
        if self._cut is not None:
            self._recorder.cut_short = True
            # Lightning 2.6.6 ends its loop here and calls the hooks of its end, where averaged
            # weights (EMA) are swapped back for those that are saved.
            raise StopIteration

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if the validation was ended.

        Raises:
            Paused: on all workers, once the step in front of it is committed.
        """
        if self._cut is not None:
            self._pause(trainer, self._cut)

    def _see_drained(self) -> Notice | None:
        seen = None if self._watch is None else self._watch.notice
        return seen if seen is not None and seen.reason == "preempted" else None

    def _see(self) -> Notice | None:
        """Return what worker 0 has to say; None on all others."""
        if self._watch is None:
            return None
        (save_s, failed), self._saved = self._saved, self._saving
        # How long one took that failed says nothing about the next.
        last_s = self._saved[0] - save_s if self._saved[1] == failed else 0.0
        if not self._said_slow and not self._watch.notice:
            slow = slow_save(last_s)
            self._said_slow = slow is not None
            return slow
        return self._watch.notice

    @property
    def _saving(self) -> tuple[float, float]:
        """Seconds that saves took so far, and how many failed."""
        totals = self._recorder.committer.totals
        return totals["save_s"], totals["saves_failed"]

    def _save_more_often(self, notice: Notice) -> None:
        recorder = self._recorder
        interval = lowered(
            notice.every_s,
            before_s=recorder.schedule.every_s,
            before_steps=recorder.facts.config.train.checkpoint.every_steps,
            steps_per_s=self._looks.steps_per_s,
        )
        recorder.schedule.shorten(notice.every_s, step=recorder.step)
        if self._watch is None:
            return
        line = (
            f"a checkpoint takes {notice.save_s:.0f} s to be saved, so that one made at a notice "
            f"will not fit in {NOTICE_S:.0f} s; periodic interval {interval.words}"
        )
        fields = {"save_s": round(notice.save_s, 1), **dataclasses.asdict(interval)}
        recorder.committer.tell("slow_save", **fields)
        recorder.facts.board.say.remote(line)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look no more."""
        if self._watch is not None:
            self._watch.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Look no more."""
        self.teardown(trainer, pl_module, "fit")

    def _pause(self, trainer: pl.Trainer, notice: Notice) -> None:
        recorder = self._recorder
        committed = self._commit(trainer, notice)
        if notice.reason == "room" and not committed:
            # More workers are not worth the steps since the last commit, nor a try at each step.
            if self._look is not None and self._watch is not None:
                self._look.put_off()
                self._watch.notice = None
            return
        if trainer.global_rank == 0:
            self._tell(notice, committed=committed)
        trainer.strategy.barrier()  # the first to raise ends all others
        raise Paused(f"{notice.reason} at step {recorder.step}")

    def _commit(self, trainer: pl.Trainer, notice: Notice) -> bool:
        """Commit this step, if it is not yet, and wait for it; return whether that was done."""
        recorder = self._recorder
        try:
            for _ in range(1 if notice.reason == "room" else _TRIES):
                if recorder.committer.finish() == recorder.step:
                    return True
                recorder.commit(trainer, metrics={}, done="", must=True)
            return recorder.committer.finish() == recorder.step
        except CheckpointError:
            if notice.reason == "room":
                raise  # nothing could be saved for too long
            return False  # the node goes all the same

    def _tell(self, notice: Notice, *, committed: bool) -> None:
        recorder = self._recorder
        board, step = recorder.facts.board, recorder.step
        if notice.reason == "room":
            board.say.remote(f"room for {notice.workers} workers: starting them from step {step}")
            return
        event = preempted_event(notice.ranks, notice.deadline_s, step=step if committed else None)
        recorder.committer.tell(**event)
        recorder.committer.close(_TELL_S)
        left = "" if notice.deadline_s is None else _ahead(notice.deadline_s - time.time())
        done = f"step {step} is committed{left}" if committed else "no checkpoint could be saved"
        board.say.remote(f"preempted: the nodes of workers {list(notice.ranks)} go; {done}")


class _Look:
    """What worker 0's watch calls: drained nodes first, then room for more workers."""

    def __init__(self, nodes: Sequence[str], scaling: ScalingConfig, *, every_s: float) -> None:
        self._nodes = nodes
        self._scaling = scaling
        self._every_s = every_s
        self._began = time.monotonic()

    def __call__(self) -> Notice | None:
        notice = drained(self._nodes, elastic.draining_nodes())
        if notice is not None or not self._is_time:
            return notice
        # By what is free this moment, not by what will be: a pause for nothing costs a restart.
        more = elastic.room(elastic.free_nodes(), [], self._scaling)
        if not more:
            return None
        workers = min(self._scaling.max_workers, len(self._nodes) + more)
        return Notice(reason="room", workers=workers)

    def put_off(self) -> None:
        """Look for room again after as long as at the start."""
        self._began = time.monotonic()

    @property
    def _is_time(self) -> bool:
        grows = self._scaling.is_elastic and len(self._nodes) < self._scaling.max_workers
        return grows and time.monotonic() - self._began >= self._every_s


def _ahead(seconds: float) -> str:
    if seconds < 0:
        return f", {-seconds:.0f} s after the deadline"
    return f", {seconds:.0f} s ahead of the deadline"


def resized_event(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what to say where the last two starts had different numbers of workers, else None."""
    starts = [i for i, event in enumerate(events) if event["event"] == "training"]
    if len(starts) < 2:
        return None
    before, now = events[starts[-2]], events[starts[-1]]
    if before["workers"] == now["workers"]:
        return None
    between = {event["event"] for event in events[starts[-2] : starts[-1]]}
    reason = "workers were lost"
    if now["workers"] > before["workers"]:
        reason = "more nodes are there"
    if "preempted" in between and now["workers"] < before["workers"]:
        reason = "nodes were preempted"
    if "submitted" in between:
        reason = "submitted again"
    return {
        "from": before["workers"],
        "to": now["workers"],
        "reason": reason,
        "step": now["step"],
    }
