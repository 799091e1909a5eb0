"""What each worker holds under DDP and ZeRO 1, 2, 3, measured, against the ZeRO paper's formula.

    python jobs/bench_zero.py [--workers 2] [--width 1024] [--precision 32 bf16]

Real DeepSpeed engines in gloo processes on CPUs, through the strategies that training uses. Counted
in the middle of an accumulated step: every tensor that Python holds, each storage once. The formula
is `orchestrator.train.strategies.memory.need` (Rajbhandari et al., "ZeRO", SC 2020, section 3).
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray.train.torch  # noqa: F401  (Lightning's Ray strategies look it up)
import torch
from gloo import run_workers
from held import alive, count, new_bytes
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.nn import functional

from orchestrator.train.strategies import memory, shards
from orchestrator.train.strategies.memory import ModelSize, Need, in_words, need
from orchestrator.train.strategies.precision import Choice, lightning_precision
from orchestrator.train.strategies.strategy import build_strategy, sync_buffers

CPU = torch.device("cpu")
INPUTS, CLASSES, BATCH = 256, 10, 24
KINDS = ("parameters", "gradients", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a few steps."""

    strategy: str
    precision: str = "32"
    width: int = 512
    optimizer: str = "adamw"
    steps: int = 4
    first: int = 0
    """The first step: those before it were taken by the run that is resumed."""
    accumulation: int = 2
    clip: float | None = None
    bucket: int = memory.BUCKET
    offload: bool = False
    frozen: bool = False
    """Whether the first layer is not trained."""
    count: bool = False
    """Whether to count what is held, which takes a second."""
    load: str = ""
    """Folder of a state to go on from."""
    save: str = ""
    """Folder to write the state after the last step to."""


@dataclasses.dataclass
class Outcome:
    """What one worker saw."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """Mean loss of its own samples in each micro-batch."""
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arrays of the last step's weights, on worker 0; fp32 master weights count as they are."""
    decays: list[float] = dataclasses.field(default_factory=list)
    """Weight decay of each parameter group after the state was loaded."""
    moved: float = 0.0
    """Square of how far its share of the fp32 weights went (under DDP the whole is its share)."""
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of parameters, gradients, optimizer, on the host where offloaded, everything else."""


class Model(pl.LightningModule):
    """Linear layers of more than 100,000 weights each, with a norm that has running statistics."""

    def __init__(self, width: int, optimizer: str, *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(INPUTS, width), nn.BatchNorm1d(width)]
        for _ in range(3):
            layers += [nn.ReLU(), nn.Linear(width, width)]
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, CLASSES))
        # Its statistics depend on how a step is cut into micro-batches; its gradients shall not.
        # Replaced, so that nothing puts it into training mode again.
        self.net[1].eval()
        self.net[1].train = lambda mode=True: self.net[1]  # type: ignore[method-assign, assignment]
        self.net[0].requires_grad_(not frozen)
        self.optimizer = optimizer

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """Return the mean cross-entropy."""
        image, label = batch
        logits = self.net(image.to(next(self.net.parameters()).dtype))
        return functional.cross_entropy(logits.float(), label)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return an optimizer of two groups, as ImageClassifier's."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        # SGD's decay is not clipped with the gradient: it is to be the smaller part.
        decay = 1e-4 if self.optimizer == "sgd" else 0.1
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return {"optimizer": torch.optim.SGD(groups, lr=0.1, momentum=0.9)}
        return {"optimizer": torch.optim.AdamW(groups, lr=1e-3)}

    def size(self) -> ModelSize:
        """Return what `memory.need` asks for."""
        return ModelSize.of(
            [(p.numel(), p.requires_grad) for p in self.parameters()],
            buffer_bytes=sum(b.nbytes for b in self.buffers()),
            states=1.0 if self.optimizer == "sgd" else 2.0,
            optimizer=self.optimizer,
        )


class _Batches:
    """Worker `rank`'s micro-batches: at any world size a step has the same samples."""

    def __init__(self, trial: Trial, rank: int, world_size: int) -> None:
        self._trial, self._rank, self._world_size = trial, rank, world_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        micro = BATCH // (self._world_size * self._trial.accumulation)
        for step in range(self._trial.first, self._trial.steps):
            generator = torch.Generator().manual_seed(step)
            image = torch.randn(BATCH, INPUTS, generator=generator)
            label = torch.randint(0, CLASSES, (BATCH,), generator=generator)
            for part in range(self._trial.accumulation):
                start = (part * self._world_size + self._rank) * micro
                yield image[start : start + micro], label[start : start + micro]

    def __len__(self) -> int:
        return (self._trial.steps - self._trial.first) * self._trial.accumulation


class _Watch(pl.Callback):
    def __init__(self, trial: Trial, outcome: Outcome) -> None:
        self._trial, self._outcome = trial, outcome
        # Engines of earlier trials that something still refers to.
        self._before: set[int] = set()
        if trial.count:
            new_bytes(alive(), self._before)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        if self._trial.load:
            weights = torch.load(Path(self._trial.load, "weights.pt"))
            strategy.load_shards(Path(self._trial.load), weights)
        # Not beside a count, which would find these copies too.
        self._start = [] if self._trial.count else [w.clone() for w in _masters(trainer)]
        self._outcome.decays = [g["weight_decay"] for g in trainer.optimizers[0].param_groups]

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._trial.count and trainer.global_step == 1 and not self._outcome.held:
            offload = self._trial.offload
            self._outcome.held = count(trainer, module, self._before, offload=offload)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self._outcome.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        for start, end in zip(self._start, _masters(trainer), strict=False):
            self._outcome.moved += float((end - start).square().sum())
        sync_buffers(module)
        weights = strategy.weights()
        if trainer.global_rank == 0:
            self._outcome.weights = {k: v.float().numpy().copy() for k, v in weights.items()}
        if self._trial.save:
            folder = Path(self._trial.save)
            for name, content in strategy.shards().items():
                torch.save(content, folder / name)
            if trainer.global_rank == 0:
                torch.save(weights, folder / "weights.pt")
                torch.save(strategy.optimizer_states(), folder / "optimizers.pt")


def _masters(trainer: pl.Trainer) -> list[torch.Tensor]:
    """Return the fp32 weights that this worker's optimizer changes."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    if engine is None or not hasattr(engine, "optimizer"):
        return [p.detach() for p in trainer.lightning_module.parameters()]
    return [group.master.detach() for group in shards.groups_of(engine.optimizer)]


def train(rank: int, world_size: int, trials: list[Trial]) -> list[Outcome]:
    """Run trials one after the other in the process of one worker."""
    return [_train(trial, rank, world_size) for trial in trials]


def _train(trial: Trial, rank: int, world_size: int) -> Outcome:
    outcome = Outcome()
    memory.BUCKET = trial.bucket
    strategy = build_strategy(Choice(trial.strategy, ""), lambda: 1.0, CPU, offload=trial.offload)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        precision=lightning_precision(trial.precision),
        max_epochs=1,
        accumulate_grad_batches=trial.accumulation,
        gradient_clip_val=trial.clip,
        callbacks=[_Watch(trial, outcome)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Model(trial.width, trial.optimizer, frozen=trial.frozen)
    if trial.load:  # nothing of a fresh model may do in place of what was saved
        for tensor in module.state_dict().values():
            tensor.zero_()
    trainer.fit(module, _Batches(trial, rank, world_size))
    return outcome


def expected(trial: Trial, num_workers: int) -> Need:
    """Return what the formula says."""
    size = Model(trial.width, trial.optimizer, frozen=trial.frozen).size()
    options = {"precision": trial.precision, "offload": trial.offload}
    return need(size, trial.strategy, num_workers=num_workers, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--precision", nargs="+", default=["32", "bf16"])
    args = parser.parse_args(argv)
    trials = [
        Trial(strategy=strategy, precision=precision, width=args.width, count=True)
        for precision in args.precision
        for strategy in memory.STRATEGIES
    ]
    parameters = Model(args.width, "adamw").size().parameters
    print(f"{parameters:,} parameters, AdamW, {args.workers} workers")
    columns = ("precision", "strategy", *KINDS, "together", "formula", "buffers")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    outcomes = run_workers(train, args.workers, trials)[0]
    for trial, outcome in zip(trials, outcomes, strict=True):
        held, formula = outcome.held, expected(trial, args.workers)
        together = sum(held[kind] for kind in KINDS)
        cells = [in_words(held[kind]) for kind in KINDS]
        share = f"{in_words(formula.states)} ({together / formula.states - 1:+.1%})"
        cells += [in_words(together), share, in_words(held["work"])]
        print(f"| {trial.precision} | {trial.strategy} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
