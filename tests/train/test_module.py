"""The default LightningModule under a real Trainer, alone and on two processes."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional

from orchestrator.config import UserError
from orchestrator.train.module import (
    ImageClassifier,
    check_label_kind,
    learning_rate_factor,
    parameter_groups,
)

CLASSES = 4


def batch(size: int, seed: int, first_id: str = "a") -> dict[str, Any]:
    """Images whose class is the brightest of four quarters."""
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (size,), generator=random)
    image = torch.randn(size, 3, 16, 16, generator=random) * 0.3
    for i, quarter in enumerate(label.tolist()):
        top, left = 8 * (quarter // 2), 8 * (quarter % 2)
        image[i, :, top : top + 8, left : left + 8] += 1
    return {"image": image, "label": label, "id": [first_id, *map(str, range(1, size))]}


class Batches(tuple[dict[str, Any], ...]):
    """One loader: Lightning takes a plain list or tuple for several."""


def module(**options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(**{"num_classes": CLASSES, "lr": 3e-3, **options})


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def exact(model: ImageClassifier, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Loss and accuracy over all samples, the plain way."""
    with torch.inference_mode():
        logits = torch.cat([model(b["image"]) for b in batches]).double()
    labels = torch.cat([b["label"] for b in batches])
    loss = functional.cross_entropy(logits, labels)
    return {"val_loss": float(loss), "val_acc": float((logits.argmax(1) == labels).double().mean())}


def test_it_learns() -> None:
    model = module(label_smoothing=0.1)
    model.total_steps = 40
    fit = trainer(max_epochs=4)
    fit.fit(model, Batches(batch(16, s) for s in range(10)), Batches([batch(50, 99)]))
    assert float(fit.callback_metrics["val_acc"]) > 0.95
    assert 0 < float(fit.callback_metrics["train_loss"]) < 1
    # The schedule was stepped after every step and has reached its end.
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_validation_counts_samples_and_not_batches() -> None:
    model, batches = module(), [batch(7, 1), batch(6, 2), batch(1, 3)]
    stand_in = batch(5, 4, first_id="")
    found = trainer().validate(model, Batches([*batches, stand_in]), verbose=False)[0]
    assert found == pytest.approx(exact(model, batches), rel=1e-5)


class Uneven(pl.LightningDataModule):
    """Ranks whose batches differ by a sample, as the loader's do."""

    shares = ([(4, 10), (3, 11)], [(3, 20), (3, 21)])

    def val_dataloader(self) -> Batches:
        assert self.trainer is not None
        share = self.shares[self.trainer.global_rank]
        return Batches(batch(size, seed) for size, seed in share)


def test_validation_is_exact_over_two_processes() -> None:
    model = module()
    both = trainer(strategy="ddp_spawn", devices=2)
    found = both.validate(model, datamodule=Uneven(), verbose=False)[0]
    everything = [batch(size, seed) for share in Uneven.shares for size, seed in share]
    assert found == pytest.approx(exact(model, everything), rel=1e-5)


def test_a_loss_that_is_not_finite_shows() -> None:
    model = module()
    torch.nn.init.constant_(model.network[-1].weight, float("nan"))
    found = trainer().validate(model, Batches([batch(4, 0)]), verbose=False)[0]
    assert found["val_loss"] != found["val_loss"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # What a worker has; two threads on a busy machine wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_autocast_and_bf16_weights(weights: torch.dtype) -> None:
    model = module().to(weights)
    fit = trainer(precision="bf16-mixed", max_epochs=1)
    fit.fit(model, Batches([batch(8, 0)]), Batches([batch(300, 1)]))
    assert fit.callback_metrics["train_loss"].dtype == torch.float32
    found = {name: float(fit.callback_metrics[name]) for name in ("val_loss", "val_acc")}
    assert found == pytest.approx(exact(model, [batch(300, 1)]), rel=0.02)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_are_probabilities(smoothing: float) -> None:
    model, hard = module(label_smoothing=smoothing), batch(6, 0)
    soft = {**hard, "label": functional.one_hot(hard["label"], CLASSES).float()}
    neighbour = {**hard, "label": soft["label"].roll(1, 0)}
    mixed = {**hard, "label": 0.7 * soft["label"] + 0.3 * neighbour["label"]}
    first, same, second, both = (
        model.training_step(each, 0).item() for each in (hard, soft, neighbour, mixed)
    )
    assert same == pytest.approx(first, rel=1e-6)
    assert both == pytest.approx(0.7 * first + 0.3 * second, rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains_with_soft_labels_and_validates_with_classes(precision: str) -> None:
    batches = [batch(16, s) for s in range(10)]
    for each in batches:
        each["label"] = 0.9 * functional.one_hot(each["label"], CLASSES) + 0.1 / CLASSES
    fit = trainer(max_epochs=3, precision=precision)
    fit.fit(module(), Batches(batches), Batches([batch(50, 99)]))
    assert float(fit.callback_metrics["val_acc"]) > 0.9


def test_labels_that_are_not_classes_are_one_sentence() -> None:
    check_label_kind("class")
    with pytest.raises(
        UserError, match=r"learns one class for each image but .* are 'multi'; name"
    ):
        check_label_kind("multi")


def test_norms_and_biases_have_no_weight_decay() -> None:
    network = module().network
    decayed, free = parameter_groups(network, 0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim in (2, 4) for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert len({id(p) for group in (decayed, free) for p in group["params"]}) == len(names)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(s, warmup_steps=4, total_steps=20) for s in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[12] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(0)
    assert learning_rate_factor(10_000, warmup_steps=4, total_steps=0) == 1.0
    assert learning_rate_factor(25, warmup_steps=4, total_steps=20) == pytest.approx(0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_warm_up_is_a_twentieth_of_the_run_unless_named(name: str) -> None:
    model = module(optimizer=name)
    model.total_steps = 200
    scheduler = model.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.get_last_lr()[0] == pytest.approx(3e-3 / 11)
    no_warmup = module(optimizer=name, warmup_steps=0)
    scheduler = no_warmup.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.get_last_lr() == [3e-3, 3e-3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", None),
        ("num_classes", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("optimizer", "adam"),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("label_smoothing", 1.0),
        ("warmup_steps", -1),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"model\.init_args\.{name} must be "):
        module(**{name: value})
