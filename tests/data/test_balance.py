"""Class-balanced picks: exact shares in a window, from the key alone, with little variance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import UserError
from orchestrator.data.balance import class_weights, picks, rare_classes

CLASSES = ("cat", "dog", "emu")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.lists(st.floats(0, 10) | st.just(0.0), min_size=5, max_size=5),
    st.integers(0, 2**64 - 1),
)
def test_every_sample_and_class_gets_its_share_rounded(labels, weights, key):
    labels, weights = np.array(labels), np.array(weights)
    taken = picks(labels, weights, key)
    assert taken.shape == labels.shape
    assert taken.min() >= 0
    assert taken.max() < len(labels)
    each = weights[labels] if weights[labels].any() else np.ones(len(labels))
    share = len(labels) * each / each.sum()
    counts = np.bincount(taken, minlength=len(labels))
    assert (np.abs(counts - share) < 1 + 1e-6).all()
    per_class = np.bincount(labels[taken], minlength=5) - np.bincount(labels, share, minlength=5)
    assert (np.abs(per_class) < 1 + 1e-6).all()
    assert (counts[each == 0] == 0).all()


def test_equal_weights_take_every_sample_once():
    labels = np.arange(100) % 7
    taken = picks(labels, np.full(7, 0.3), key=5)
    assert np.array_equal(np.sort(taken), np.arange(100))
    assert not np.array_equal(taken, np.arange(100))


def test_picks_depend_on_the_key_alone():
    labels, weights = np.arange(64) % 3, np.array([1.0, 2.0, 5.0])
    again = [picks(labels, weights, key=key).tolist() for key in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    # Written down once: a run resumed under a newer version must find the same picks.
    assert picks(np.array([0, 0, 1, 1, 2, 0]), weights, key=42).tolist() == [4, 3, 2, 4, 5, 0]


def test_balanced_evens_out_the_classes_of_every_window():
    rng = np.random.default_rng(0)
    samples = np.array([9000, 900, 100])
    weights = class_weights("balanced", classes=CLASSES, class_samples=samples.tolist())
    labels = rng.permutation(np.repeat(np.arange(3), samples))
    windows = labels.reshape(-1, 1000)
    counts = np.array(
        [np.bincount(w[picks(w, weights, key)], minlength=3) for key, w in enumerate(windows)]
    )
    assert (counts.sum(axis=1) == 1000).all()
    assert np.abs(counts.mean(axis=0) / 1000 - 1 / 3).max() < 0.03


def test_over_many_keys_each_sample_is_taken_as_often_as_its_weight_says():
    labels, weights = np.repeat([0, 1], [90, 10]), np.array([1.0, 4.5])
    share = 100 * weights[labels] / weights[labels].sum()
    counts = np.zeros(100)
    naive = np.zeros((2, 2000))
    rng = np.random.default_rng(0)
    for key in range(2000):
        taken = picks(labels, weights, key)
        counts += np.bincount(taken, minlength=100)
        naive[0, key] = (labels[taken] == 1).sum()
        naive[1, key] = (labels[rng.choice(100, 100, p=share / 100)] == 1).sum()
    assert np.abs(counts / 2000 - share).max() < 0.06  # 5 standard errors: 5 * 0.5 / sqrt(2000)
    # Independent draws of this share of 1/3 vary by sqrt(100 * 1/3 * 2/3) = 4.7 samples; ours by
    # whether 33.3 is rounded up.
    assert naive[0].std() < 0.5
    assert 4.3 < naive[1].std() < 5.1
    assert abs(naive[0].mean() - 100 / 3) < 0.1


def test_a_window_without_any_wanted_class_is_taken_as_it_is():
    taken = picks(np.zeros(9, dtype=np.int64), np.array([0.0, 1.0]), key=3)
    assert sorted(taken.tolist()) == list(range(9))


def test_weights_by_name_leave_the_others_at_one():
    weights = class_weights({"emu": 4, "cat": 0}, classes=CLASSES, class_samples=())
    assert weights.tolist() == [0, 1, 4]
    balanced = class_weights("balanced", classes=CLASSES, class_samples=[10, 0, 5])
    assert balanced.tolist() == [0.1, 0, 0.2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("balanced", "needs the samples of each class"),
        ({"cow": 1}, r"names 'cow', which is none of the 3 classes such as cat, dog, emu"),
        ({"cat": -1}, r"data\.class_weights\.cat must be a number of at least 0, but it is -1"),
        ({"cat": float("nan")}, "must be a number"),
        ({"cat": 0, "dog": 0, "emu": 0}, "leaves out every class"),
    ],
)
def test_weights_that_do_not_fit_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        class_weights(setting, classes=CLASSES, class_samples=())


def test_labels_that_are_no_classes_have_no_weights():
    with pytest.raises(UserError, match=r"needs one class for each image but .* kind 'float'"):
        class_weights({}, classes=(), class_samples=(), label_kind="float")


def test_classes_that_a_window_seldom_holds_are_named():
    assert rare_classes([9000, 990, 9, 0], window=1024) == [2]
    assert rare_classes([9000, 990, 10, 0], window=1024) == []
