"""What a step computes does not depend on how many workers share it: gradients, clipping, rates.

Real batches, strategies and checkpoints in bare gloo processes; see bare.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare import Ended, Start, open_loader, train
from numeric_modules import Plain
from packed import write_packed

from orchestrator.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig
from orchestrator.data import feeds
from orchestrator.data.index import Index
from orchestrator.data.sources import read_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GLOBAL_BATCH, EPOCHS, CLIP = 13, 3, 0.05  # 13 is no multiple of 2 or 3 workers
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
SCHEDULES = ("one_cycle", "every_2_steps", "epochs", "plateau", "plateau_steps")
ZERO_SCHEDULES = [("one_cycle", "zero1"), ("plateau", "zero3")]
GRADIENTS = {
    **{(strategy, "tensor"): {"strategy": strategy} for strategy in STRATEGIES},
    ("ddp", "dict"): {"strategy": "ddp", "returns": "dict"},
    ("ddp", "manual"): {"strategy": "ddp", "returns": "manual", "micro": GLOBAL_BATCH},
}
CLIPPED = {
    **{(s, "32"): {"strategy": s, "clip": CLIP, "scale": 10.0} for s in STRATEGIES},
    ("ddp", "bf16"): {"strategy": "ddp", "clip": CLIP, "scale": 10.0, "precision": "bf16"},
    # Not tenfold: the first scale of the loss, 65536, would be too large for it.
    ("ddp", "16"): {"strategy": "ddp", "clip": CLIP, "precision": "16"},
}
Outcomes = dict[tuple[int, Any], list[Ended]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    # So that some micro-batches are short or empty.
    broken = {f"train-{i:04d}": b"no image" for i in range(0, 40, 3)}
    return write_packed(folder, train=40, val=7, broken=broken)


def make_config(index: Index, module: str, *, micro: int = 2, **options: Any) -> Config:
    train = {k: options.pop(k) for k in ("strategy", "precision") if k in options}
    return Config(
        name="run",
        data=DataConfig(
            index=index.uri,
            global_batch=GLOBAL_BATCH,
            max_micro_batch=micro,
            eval_batch=4,
            image_size=8,
            window_chunks=3,
        ),
        model=ModelConfig(class_path=f"numeric_modules.{module}", init_args=options),
        train=TrainConfig(
            **{"precision": "32", "strategy": "ddp", **train},
            max_epochs=EPOCHS,
            gradient_clip_norm=options.pop("clip", None),
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=2),
        ),
    )


@pytest.fixture(scope="module")
def outcomes(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for workers in (1, 2, 3):
        starts = {key: _first_step(index, folder / f"{workers}-{key}", **options)
                  for key, options in [*GRADIENTS.items(), *CLIPPED.items()]}  # fmt: skip
        for schedule in SCHEDULES:
            config = make_config(index, "Scheduled", schedule=schedule, micro=4)
            starts[schedule] = Start(run=str(folder / f"{workers}-{schedule}"), config=config)
            # Two workers are killed after 5 steps, three go on.
            resumed = Start(run=str(folder / schedule), config=config, stop_after=5)
            if workers > 1:
                stop = 5 if workers == 2 else None
                starts[schedule, "resumed"] = dataclasses.replace(resumed, stop_after=stop)
        for schedule, strategy in ZERO_SCHEDULES if workers > 1 else ():
            config = make_config(index, "Scheduled", schedule=schedule, micro=4, strategy=strategy)
            run = str(folder / f"{schedule}-{strategy}")
            stop = 5 if workers == 2 else None
            starts[schedule, strategy] = Start(run=run, config=config, stop_after=stop)
        seen = train(workers, *starts.values())
        found |= {(workers, key): each for key, each in zip(starts, seen, strict=True)}
    return found


def _first_step(index: Index, run: Path, **options: Any) -> Start:
    return Start(run=str(run), config=make_config(index, "Plain", **options), stop_after=1)


@pytest.fixture(scope="module")
def gradient(index: Index) -> dict[str, np.ndarray]:
    """Return the first step's gradient: plain PyTorch, all samples in one process at once."""
    config = make_config(index, "Plain", micro=GLOBAL_BATCH)
    feed = feeds.training_feed(config, read_data(config.data), num_workers=1)
    batch = next(iter(open_loader(feed, config, rank=0, step=0).take(1)))
    assert 2 < len(batch["id"]) < GLOBAL_BATCH
    module = Plain()
    (module.loss(batch) * len(batch["id"]) / GLOBAL_BATCH).backward()
    return {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}


def update_of(ended: Ended) -> dict[str, np.ndarray]:
    """Return how far the first step went: with lr 1, its (clipped) gradient."""
    assert not ended.error
    start = dict(Plain().named_parameters())
    return {name: start[name].detach().numpy() - end for name, end in ended.weights.items()}


def norm_of(update: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(part).sum() for part in update.values())))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("key", GRADIENTS)
def test_the_gradient_is_that_of_one_process(
    outcomes: Outcomes, gradient: dict[str, np.ndarray], key: tuple[str, str], workers: int
) -> None:
    update = update_of(outcomes[workers, key][0])
    assert norm_of(gradient) > 0.1
    for name, expected in gradient.items():
        np.testing.assert_allclose(update[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("key", CLIPPED)
def test_the_clipped_gradient_is_that_of_one_process(
    outcomes: Outcomes, gradient: dict[str, np.ndarray], key: tuple[str, str], workers: int
) -> None:
    update = update_of(outcomes[workers, key][0])
    exact = key[1] == "32"
    # Tenfold losses: without clipping, or with each worker's part clipped, it would be longer.
    assert norm_of(update) == pytest.approx(CLIP, rel=1e-4 if exact else 1e-2)
    for name, whole in gradient.items():
        expected = whole * CLIP / norm_of(gradient)
        np.testing.assert_allclose(update[name], expected, rtol=0, atol=1e-6 if exact else 1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_a_function_of_the_samples(outcomes: Outcomes, schedule: str) -> None:
    alone = outcomes[1, schedule][0]
    steps = -(-40 * EPOCHS // GLOBAL_BATCH)
    assert alone.noted["total"] == steps
    assert list(alone.rates) == list(range(steps))
    assert len(set(alone.rates.values())) > 1
    for workers in (2, 3):
        assert outcomes[workers, schedule][0].rates == alone.rates
    killed, resumed = (outcomes[n, (schedule, "resumed")][0] for n in (2, 3))
    assert list(killed.rates) == [0, 1, 2, 3, 4]
    assert {**killed.rates, **resumed.rates} == alone.rates
    assert min(resumed.rates) == 4
    for ended in (killed, resumed):
        assert ended.noted["total"] == steps
        assert ended.noted["epoch_steps"] == alone.noted["epoch_steps"] == 4


@pytest.mark.parametrize("key", ZERO_SCHEDULES)
def test_rates_are_those_of_ddp_under_zero(outcomes: Outcomes, key: tuple[str, str]) -> None:
    alone, (killed, resumed) = outcomes[1, key[0]][0], (outcomes[n, key][0] for n in (2, 3))
    assert list(killed.rates) == [0, 1, 2, 3, 4]
    assert {**killed.rates, **resumed.rates} == alone.rates


def test_the_samples_of_a_step_are_the_same_at_any_world_size(outcomes: Outcomes) -> None:
    def consumed(workers: int) -> set[str]:
        noted = [ended.noted["ids"] for ended in outcomes[workers, ("ddp", "tensor")]]
        return {i for batches in noted for ids in batches for i in ids if i}

    assert consumed(1) == consumed(2) == consumed(3)
    assert 2 < len(consumed(1)) < GLOBAL_BATCH


def test_steps_by_hand_are_counted_on_after_a_resume(index: Index, tmp_path: Path) -> None:
    config = make_config(index, "Twice", micro=GLOBAL_BATCH)
    starts = [Start(run=str(tmp_path), config=config, stop_after=n) for n in (5, None)]
    before, after = (workers[0].noted["counted"] for workers in train(1, *starts))
    assert before == [0, 2, 4, 6, 8]
    assert after[0] == 2 * 4  # the checkpoint of step 4
    assert after == [2 * step for step in range(4, 4 + len(after))]


@pytest.mark.parametrize(
    ("module", "micro", "workers", "said"),
    [
        ("Direct", GLOBAL_BATCH, 2, "self.manual_backward(loss)"),
        ("Skips", 2, 1, "Skips.training_step returned no loss, "),
    ],
)
def test_a_module_that_learns_past_the_weighted_loss_is_refused(
    index: Index, tmp_path: Path, module: str, micro: int, workers: int, said: str
) -> None:
    config = make_config(index, module, micro=micro)
    ended = train(workers, Start(run=str(tmp_path / module), config=config))[0]
    assert all(said in each.error for each in ended)
