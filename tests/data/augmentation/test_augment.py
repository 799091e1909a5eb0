"""Augmented micro-batches: what a sample becomes depends on (seed, epoch, id) and nothing else."""

import dataclasses
from typing import Any

import pytest
import torch
from pictures import micro_batch

from orchestrator.config import AugmentConfig, DataConfig, UserError
from orchestrator.data.augmentation import augment
from orchestrator.data.batch import MicroBatch
from orchestrator.data.device import ToDevice

CPU = torch.device("cpu")
V2 = "torchvision.transforms.v2"
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
POSTERIZE = {"class_path": f"{V2}.RandomPosterize", "init_args": {"bits": 2, "p": 0.5}}
EVERYTHING = AugmentConfig(
    **JITTER, policy="randaugment", erasing=0.5, mixup_alpha=0.3, cutmix_alpha=1.0, mix_prob=0.8,
    transforms=[{"class_path": f"{V2}.ColorJitter", "init_args": {"hue": 0.2}}, POSTERIZE],
)  # fmt: skip


def to_device(config: AugmentConfig, *, seed: int | None = 0, **options: Any) -> ToDevice:
    data = DataConfig(augment=config, image_size=32)
    return ToDevice(CPU, data, **{"num_classes": 10, **options}, seed=seed)


def images(config: AugmentConfig, batch: MicroBatch, **options: Any) -> torch.Tensor:
    image: torch.Tensor = to_device(config, **options)(batch)["image"].clone()
    return image


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(**JITTER),
        AugmentConfig(policy="randaugment", magnitude=20),
        AugmentConfig(policy="trivialaugment"),
        AugmentConfig(transforms=EVERYTHING.transforms),
        AugmentConfig(erasing=0.5),
        dataclasses.replace(EVERYTHING, mixup_alpha=0.0, cutmix_alpha=0.0),
    ],
)
def test_a_sample_is_bit_equal_in_every_micro_batch(config: AugmentConfig) -> None:
    whole = images(config, micro_batch(range(64)))
    for rows in ([5], range(0, 64, 3), range(63, 0, -7)):
        assert torch.equal(images(config, micro_batch(rows)), whole[list(rows)])
    assert torch.equal(images(config, micro_batch(range(64))), whole)
    plain = images(AugmentConfig(), micro_batch(range(64)))
    assert (whole != plain).flatten(1).any(1).sum() > 20
    for other in (
        images(config, micro_batch(range(64), epoch=1)),
        images(config, micro_batch(range(64)), seed=1),
    ):
        assert (other != whole).flatten(1).any(1).sum() > 30


def test_mixing_is_bit_equal_for_the_same_neighbour() -> None:
    whole = to_device(EVERYTHING)(micro_batch(range(64)))
    part = to_device(EVERYTHING)(micro_batch(range(10, 30)))
    assert torch.equal(part["image"][1:], whole["image"][11:30])
    assert torch.equal(part["label"][1:], whole["label"][11:30])


def test_mixed_labels_add_up_to_one_and_name_the_two_that_were_mixed() -> None:
    for config in (
        EVERYTHING,
        AugmentConfig(mixup_alpha=0.2),
        AugmentConfig(cutmix_alpha=1.0),
        AugmentConfig(mixup_alpha=1.0, mix_prob=0.3),
    ):
        label = to_device(config)(micro_batch(range(64)))["label"]
        assert label.dtype == torch.float32
        assert label.shape == (64, 10)
        assert label.sum(1) == pytest.approx(torch.ones(64), abs=1e-6)
        assert 0 <= label.min() <= label.max() <= 1
        rows = torch.arange(64)
        assert (label[rows, rows % 10] + label[rows, (rows - 1) % 64 % 10]).min() > 1 - 1e-6


def test_mixup_blends_pixels_as_it_blends_labels() -> None:
    batch = micro_batch(range(64))
    plain = images(AugmentConfig(), batch)
    mixed = to_device(AugmentConfig(mixup_alpha=1.0))(batch)
    weight = mixed["label"][torch.arange(64), torch.arange(64) % 10].view(-1, 1, 1, 1)
    expected = plain * weight + plain.roll(1, 0) * (1 - weight)
    assert (mixed["image"] - expected).abs().max() < 1e-5
    assert mixed["image"].is_contiguous(memory_format=torch.channels_last)


def test_cutmix_takes_whole_pixels_of_the_neighbour_as_the_label_says() -> None:
    batch = micro_batch(range(64))
    plain = images(AugmentConfig(), batch)
    cut = to_device(AugmentConfig(cutmix_alpha=1.0))(batch)
    own = (cut["image"] == plain).all(1)
    assert (own | (cut["image"] == plain.roll(1, 0)).all(1)).all()
    weight = cut["label"][torch.arange(64), torch.arange(64) % 10]
    # Photographs agree with their neighbours in places, by chance.
    assert own.flatten(1).double().mean(1) == pytest.approx(weight.double(), abs=0.05)
    assert weight.min() < 0.3
    assert weight.max() > 0.8


def test_erased_pixels_have_the_mean_colour() -> None:
    batch = micro_batch(range(64))
    plain, erased = images(AugmentConfig(), batch), images(AugmentConfig(erasing=1.0), batch)
    changed = (plain != erased).any(1, keepdim=True).expand(-1, 3, -1, -1)
    assert erased[changed].abs().max() < 0.5 / 255 / 0.224
    shares = changed[:, 0].flatten(1).double().mean(1)
    assert shares.min() > 0.01
    assert shares.max() < 0.36


def test_the_loaders_pixels_stay_as_they_are() -> None:
    batch = micro_batch(range(64))
    before = batch.pixels.clone()
    to_device(EVERYTHING)(batch)
    assert torch.equal(batch.pixels, before)


def test_validation_is_not_augmented() -> None:
    batch = micro_batch(range(8))
    found = to_device(EVERYTHING, seed=None)(batch)
    assert found["label"].tolist() == batch.labels
    assert torch.equal(found["image"], images(AugmentConfig(), batch))


def test_a_transform_neither_reads_nor_moves_the_callers_random_state() -> None:
    config = AugmentConfig(transforms=EVERYTHING.transforms)
    torch.manual_seed(1)
    first, after = images(config, micro_batch(range(8))), torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(images(config, micro_batch(range(8))), first)
    torch.manual_seed(1)
    assert torch.rand(1) == after


def check(label_kind: Any = "class", **options: Any) -> None:
    data = DataConfig(augment=AugmentConfig(**options), image_size=32)
    augment.check(data, label_kind=label_kind)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("brightness", -0.1), ("contrast", float("nan")), ("saturation", float("inf")),
        ("hue", 0.6), ("erasing", 1.1), ("mix_prob", -1.0), ("num_ops", 0), ("magnitude", 31),
        ("erasing_scale", (0.5, 0.1)), ("erasing_ratio", (0.0, 1.0)), ("mixup_alpha", -1.0),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^data\.augment\.{name}=.* must be .*; change it\.$"):
        check(**{name: value})


def test_sound_settings_pass() -> None:
    check()
    check(**{f.name: getattr(EVERYTHING, f.name) for f in dataclasses.fields(EVERYTHING)})
    check("multi", mixup_alpha=0.2)
    check("none", policy="trivialaugment")


@pytest.mark.parametrize("kind", ["float", "none"])
def test_labels_that_cannot_be_mixed_are_one_sentence(kind: str) -> None:
    with pytest.raises(UserError, match=rf"cutmix_alpha=1\.0 mixes labels, .*'{kind}'; set it to"):
        check(kind, cutmix_alpha=1.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": "x"}, r"\[0\] must have the keys class_path and init_args, not \['class'\]"),
        ({"class_path": f"{V2}.Nope"}, r"\[0\]\.class_path='.*Nope' does not import"),
        ({"class_path": "no.such.Thing"}, "does not import .*ModuleNotFoundError"),
        ({"class_path": f"{V2}.GaussianBlur"}, r"init_args=\{\} do not fit .*kernel_size"),
        ({"class_path": "fractions.Fraction"}, "builds a Fraction, which cannot be called"),
        (
            {"class_path": f"{V2}.CenterCrop", "init_args": {"size": 8}},
            r"must return what it is given, .*not torch\.uint8 of shape \(3, 8, 8\)",
        ),
        ({"class_path": f"{V2}.ToPILImage"}, "must return what it is given.*not Image"),
        (
            {"class_path": f"{V2}.Normalize", "init_args": {"mean": [0.0], "std": [1.0]}},
            r"\[0\] \(.*Normalize\) fails on a uint8 image",
        ),
    ],
)
def test_a_transform_that_cannot_be_used_is_one_sentence(
    entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(transforms=[entry])
