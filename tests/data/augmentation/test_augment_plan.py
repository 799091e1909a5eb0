"""What is drawn for a sample: torchvision's tables and distributions."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from orchestrator.config import AugmentConfig
from orchestrator.data.augmentation.boxes import erased, mixed
from orchestrator.data.augmentation.draws import Draws
from orchestrator.data.augmentation.plan import (
    POLICY_OPS,
    Op,
    jitter_slots,
    magnitudes,
    policy_slots,
)

THEIR_NAMES = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


def draws(count: int) -> Draws:
    return Draws(0, epochs=[0] * count, ids=[str(i) for i in range(count)])


@pytest.mark.parametrize("side", [32, 224, 331])
@pytest.mark.parametrize(
    ("policy", "theirs"),
    [("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)],
)
def test_the_operations_and_strengths_are_those_of_torchvision(
    policy: str, theirs: type, side: int
) -> None:
    space, table = theirs._AUGMENTATION_SPACE, magnitudes(policy, side)
    assert tuple(space) == THEIR_NAMES
    for op, name in zip(POLICY_OPS, THEIR_NAMES, strict=True):
        their = space[name][0](31, side, side)
        expected = np.zeros(31) if their is None else their.double().numpy()
        if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
            # Their float32 has 15.999999 for 16 and cuts it off to 15.
            expected = np.trunc(expected + 1e-4)
        expected = expected * 255 if op == Op.SOLARIZE else expected
        assert table[op] == pytest.approx(expected, abs=1e-4)


def test_randaugment_draws_operations_evenly_and_signs_half_and_half() -> None:
    config = AugmentConfig(policy="randaugment", num_ops=3, magnitude=15)
    slots = policy_slots(config, draws(14_000), side=224)
    assert len(slots) == 3
    for slot in slots:
        assert np.bincount(slot.op, minlength=14) == pytest.approx(np.full(14, 1000), abs=150)
        rotated = slot.value[slot.op == Op.ROTATE]
        assert np.unique(rotated).tolist() == [-15, 15]
        assert abs(np.mean(rotated > 0) - 0.5) < 0.06
        assert np.unique(slot.value[slot.op == Op.COLOR]).tolist() == pytest.approx([0.55, 1.45])
        assert np.unique(slot.value[slot.op == Op.POSTERIZE]).tolist() == [6]
    assert abs(np.corrcoef(slots[0].op, slots[1].op)[0, 1]) < 0.04


def test_trivialaugment_draws_one_operation_of_any_strength() -> None:
    (slot,) = policy_slots(AugmentConfig(policy="trivialaugment"), draws(14_000), side=224)
    strengths = np.abs(slot.value[slot.op == Op.ROTATE]) / 135 * 30
    assert np.unique(np.rint(strengths)).tolist() == list(range(31))
    assert strengths.mean() == pytest.approx(15, abs=1.2)


def test_jitter_draws_each_factor_evenly_in_every_order() -> None:
    config = AugmentConfig(brightness=0.4, contrast=0.2, saturation=2.0, hue=0.1)
    slots = jitter_slots(config, draws(6_000))
    ranges = {Op.BRIGHTNESS: (0.6, 1.4), Op.CONTRAST: (0.8, 1.2), Op.COLOR: (0, 3)}
    for op, (low, high) in {**ranges, Op.HUE: (-0.1, 0.1)}.items():
        values = np.concatenate([slot.value[slot.op == op] for slot in slots])
        assert len(values) == 6_000
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    orders = np.unique(np.stack([slot.op for slot in slots]), axis=1, return_counts=True)[1]
    assert len(orders) == 24
    assert orders == pytest.approx(np.full(24, 250), abs=70)


def test_switching_one_factor_on_leaves_the_others_as_they_are() -> None:
    alone = jitter_slots(AugmentConfig(contrast=0.4), draws(30))[0].value
    slots = jitter_slots(AugmentConfig(contrast=0.4, hue=0.2), draws(30))
    both = sum(np.where(slot.op == Op.CONTRAST, slot.value, 0) for slot in slots)
    assert np.array_equal(alone, both)
    assert jitter_slots(AugmentConfig(), draws(3)) == []


def test_erased_rectangles_are_distributed_as_torchvisions() -> None:
    side = 224
    boxes = erased(AugmentConfig(erasing=0.25), draws(12_000), side=side)
    assert len(boxes.rows) == pytest.approx(3_000, abs=150)
    left, top, right, bottom = boxes.edges.T
    assert boxes.edges.min() >= 0
    assert max(right.max(), bottom.max()) <= side
    torch.manual_seed(0)
    transform, image = v2.RandomErasing(p=1), torch.zeros(3, side, side)
    theirs = [transform.make_params([image]) for _ in range(3_000)]
    area = (right - left) * (bottom - top) / side**2
    assert area.min() > 0.019
    assert area.max() < 0.335
    for our, name in ((left, "j"), (top, "i"), (right - left, "w"), (bottom - top, "h")):
        assert stats.ks_2samp(our, [p[name] for p in theirs]).pvalue > 1e-3
    assert stats.ks_2samp(area, [p["h"] * p["w"] / side**2 for p in theirs]).pvalue > 1e-3


def test_what_never_fits_is_never_erased() -> None:
    config = AugmentConfig(erasing=1.0, erasing_scale=(1.0, 1.0), erasing_ratio=(1.0, 1.0))
    assert len(erased(config, draws(50), side=32).rows) == 0


def test_cut_areas_and_weights_belong_together() -> None:
    side = 224
    mix = mixed(AugmentConfig(cutmix_alpha=1.0), draws(4_000), side=side)
    assert len(mix.blended) == 0
    assert mix.cut.rows.tolist() == list(range(4_000))
    left, top, right, bottom = mix.cut.edges.T
    assert mix.weight == pytest.approx(1 - (right - left) * (bottom - top) / side**2)
    torch.manual_seed(0)
    transform, image = v2.CutMix(alpha=1.0, num_classes=2), torch.zeros(2, 3, side, side)
    theirs = [transform.make_params([image])["lam_adjusted"] for _ in range(3_000)]
    assert stats.ks_2samp(mix.weight, theirs).pvalue > 1e-3


def test_with_both_each_sample_draws_one_and_mix_prob_leaves_the_rest() -> None:
    config = AugmentConfig(mixup_alpha=0.2, cutmix_alpha=1.0, mix_prob=0.6)
    mix = mixed(config, draws(10_000), side=64)
    assert len(mix.cut.rows) == pytest.approx(3_000, abs=150)
    assert len(mix.blended) == pytest.approx(3_000, abs=150)
    assert not set(mix.cut.rows.tolist()) & set(mix.blended.tolist())
    alone = np.setdiff1d(np.arange(10_000), np.concatenate([mix.cut.rows, mix.blended]))
    assert (mix.weight[alone] == 1).all()
    assert stats.kstest(mix.weight[mix.blended], stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
