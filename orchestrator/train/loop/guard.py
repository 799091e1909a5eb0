"""Worker side: stops a run whose loss or weights are no numbers any more, and says where.

Nothing is read off the device at a step: each micro-batch's loss and each step's norm of the
weights stay there, some bytes each, until the next look, which comes every few steps and before
every commit. A look is one reduction over the workers; all of them raise, or none does.

The norm is what finds the step of a gradient that is not finite where the loss still was (the
derivative of a square root at 0): the next loss would show it too, but name the next step's
samples. It costs 2.4 ms a step for the 11.7 million weights of a ResNet-18 on one CPU core. Under
fp16 with loss scaling infinite gradients are part of the method, and their steps are skipped, so
that the weights stay finite: only many in a row are a failure, and a loss that is no number.
DeepSpeed skips such steps in every precision and tells nobody: outside of fp16 that is as good as
weights that are lost, since the step's samples would count as learnt.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch

from orchestrator.config import UserError
from orchestrator.data.loader import Loader
from orchestrator.run import append_event
from orchestrator.train.errors import Diverged
from orchestrator.train.loop.skips import MOST_IN_A_ROW, Skips
from orchestrator.train.strategies.strategy import ModelStrategy
from orchestrator.train.tally import gather

_LOOK_EVERY_STEPS = 5
_NEVER = 1 << 62
# What a sentence names; the event in the run's folder names all.
_NAMED_IDS = 5


@dataclasses.dataclass(eq=False)
class _Step:
    """What one step of this worker computed; the tensors are on its device."""

    number: int
    losses: list[tuple[list[str], torch.Tensor]] = dataclasses.field(default_factory=list)
    """The ids of a micro-batch (not its pixels, which would be kept alive) and its loss."""
    norm: torch.Tensor | None = None


@dataclasses.dataclass
class _Seen:
    """One worker's account of the step that is not finite."""

    loss: float | None
    """The first of its losses that is not finite."""
    ids: list[str]
    """The samples of the micro-batches whose loss was not finite."""
    step_ids: list[str]
    """All its samples of that step."""


class Guard(pl.Callback):
    """Watches losses and weights.

    Args:
        run: URI of the run's folder.
        loader: this worker's training batches.
        step: optimizer steps done before.
        skipped: those of them that fp16 skipped.
    """

    def __init__(self, run: str, loader: Loader, *, step: int, skipped: int = 0) -> None:
        self._run, self._loader = run, loader
        self.skips = Skips(skipped)
        self._step = _Step(step + 1)
        self._steps: list[_Step] = []

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        """Note a loss; in manual optimization there may be several of one micro-batch."""
        assert self._loader.current is not None
        self._has_loss = True
        self._step.losses.append((self._loader.current.batch.ids, loss.detach()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember how often the optimizers have stepped."""
        self._stepped = trainer.global_step
        self.skips.start(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Expect a loss."""
        self._has_loss = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Close the step, and look where it is time to.

        Raises:
            UserError: a module leaves a micro-batch out, or, where it optimizes by hand, goes past
                what weights its loss.
        """
        assert self._loader.current is not None
        if pl_module.automatic_optimization and not self._has_loss:
            # On one worker: Lightning itself refuses it on several, which wait for each other.
            raise UserError(
                f"{type(pl_module).__name__}.training_step returned no loss, so that a micro-batch "
                "counts as learnt which was not; return a loss for each one, e.g. loss * 0 for one "
                "to leave out."
            )
        if trainer.global_step > self._stepped and not self._step.losses:
            raise UserError(
                f"{type(pl_module).__name__}.training_step steps its optimizer without "
                "self.manual_backward(loss), so that its loss is neither weighted by its share of "
                "data.global_batch nor watched; call that in place of loss.backward()."
            )
        self._stepped = trainer.global_step
        if not self._loader.current.ends_step:
            return
        strategy: ModelStrategy = trainer.strategy  # type: ignore[assignment]  # ours
        lost = strategy.has_skipped and trainer.precision != "16-mixed"
        self._step.norm = torch.tensor(math.nan) if lost else _norm(strategy.trained())
        self._steps.append(self._step)
        self.skips.note(trainer)
        self._step = _Step(self._step.number + 1)
        if len(self._steps) >= _LOOK_EVERY_STEPS:
            self.look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before metrics are made of weights that are no numbers."""
        self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """Read what was noted since the last look; all workers call it.

        Raises:
            Diverged: a loss or the weights were not finite, or no step changed anything any more;
                the same on all workers.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        self.skips.look()
        device = trainer.strategy.root_device
        mine = torch.tensor(_first(steps, device), device=device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MIN)
        number = int(mine)
        is_stuck = number == _NEVER and self.skips.in_a_row >= MOST_IN_A_ROW
        if number == _NEVER and not is_stuck:
            return
        step = next((step for step in steps if step.number == number), steps[-1])
        seen: list[_Seen] = gather(trainer, _account(step))
        problem = _stuck(step.number, seen) if is_stuck else _sentence(number, seen)
        if trainer.global_rank == 0:
            self._tell(step.number, seen, problem)
        raise Diverged(problem)

    def _tell(self, number: int, seen: list[_Seen], problem: str) -> None:
        append_event(
            self._run,
            "not_finite",
            step=number,
            problem=problem,
            ids=[i for each in seen for i in each.ids],
            step_ids=[i for each in seen for i in each.step_ids],
        )


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a number that is finite if all elements are, on their device.

    The 2-norm, because the largest element takes PyTorch's CPU kernels 13 times as long. It is
    infinite too from weights of 1e19 on.
    """
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()])
    return torch.stack([norm.float() for norm in norms]).sum() if norms else torch.zeros(())


def _first(steps: list[_Step], device: torch.device) -> int:
    """Return the first step with a number that is not finite: one wait for the device in all."""
    noted = [
        (step.number, value.double().sum().to(device))
        for step in steps
        for value in [*(loss for _, loss in step.losses), step.norm]
        if value is not None
    ]
    values = torch.stack([value for _, value in noted]).tolist()
    bad = [n for (n, _), value in zip(noted, values, strict=True) if not math.isfinite(value)]
    return min(bad, default=_NEVER)


def _account(step: _Step) -> _Seen:
    flawed = [(ids, float(loss)) for ids, loss in step.losses if not math.isfinite(loss)]
    return _Seen(
        loss=flawed[0][1] if flawed else None,
        ids=_once(ids for ids, _ in flawed),
        step_ids=_once(ids for ids, _ in step.losses),
    )


def _once(batches: Iterable[list[str]]) -> list[str]:
    """Return the ids of micro-batches, each counted once whatever losses it had."""
    return [i for ids in {id(ids): ids for ids in batches}.values() for i in ids]


def _sentence(number: int, seen: list[_Seen]) -> str:
    losses = [each.loss for each in seen if each.loss is not None]
    if losses:
        ids = [i for each in seen for i in each.ids]
        return (
            f"loss is {losses[0]} at step {number}, of {_named(ids)}; lower the learning rate, set "
            "train.gradient_clip_norm, or look for a sample or an operation that yields it"
        )
    ids = [i for each in seen for i in each.step_ids]
    return (
        f"update of step {number} is not finite although its loss is: its gradient is nan or "
        f"infinite, over {_named(ids)}; lower the learning rate, or look for an operation without "
        "a finite derivative, such as the square root of 0"
    )


def _stuck(number: int, seen: list[_Seen]) -> str:
    ids = [i for each in seen for i in each.step_ids]
    return (
        f"updates of the last {MOST_IN_A_ROW} steps up to step {number} were all skipped: fp16 "
        f"holds their gradients at no scale of the loss, the last over {_named(ids)}; take "
        "train.precision bf16 or 32, lower the learning rate, or look for an operation without a "
        "finite derivative"
    )


def _named(ids: list[str]) -> str:
    named = ", ".join(ids[:_NAMED_IDS])
    if len(ids) <= _NAMED_IDS:
        return f"samples {named}"
    return f"{len(ids)} samples ({named}, ...; events.jsonl names all)"
