"""Class-balanced sampling inside one window: which of its samples are taken, and how often. Pure.

Source: systematic resampling (Kitagawa, "Monte Carlo Filter and Smoother", JCGS 1996, section 2 of
the appendix; Douc, Cappe and Moulines, "Comparison of Resampling Schemes for Particle Filtering",
ISPA 2005): one random number places a comb of n equally spaced teeth over the cumulated weights.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from orchestrator.config import UserError
from orchestrator.data.stream import Ints, hash_key, shuffled

Floats = npt.NDArray[np.float64]


def class_weights(
    setting: Literal["balanced"] | Mapping[str, float],
    *,
    classes: Sequence[str],
    class_samples: Sequence[int],
    label_kind: str = "class",
) -> Floats:
    """Return the weight of a sample of each class, shape (classes,).

    Args:
        setting: `data.class_weights`: "balanced" weighs a sample by 1 / samples of its class; a
            mapping gives weights by class name, and 1 to the classes it does not name.
        classes: their names, by label.
        class_samples: training samples by label, or nothing where they were not counted.
        label_kind: of the index.

    Raises:
        UserError: the setting does not fit the classes.
    """
    if label_kind != "class":
        raise UserError(
            f"data.class_weights={setting!r} needs one class for each image but the labels of this "
            f"data set are of the kind {label_kind!r}; set it to null."
        )
    if setting == "balanced":
        if not class_samples:
            raise UserError(
                "data.class_weights=balanced needs the samples of each class but the index does "
                "not have them; pack the data again or give the weights by class name."
            )
        counts = np.array(class_samples, dtype=np.float64)
        return np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
    assert isinstance(setting, Mapping)
    for name, weight in setting.items():
        if name not in classes:
            raise UserError(
                f"data.class_weights names {name!r}, which is none of the {len(classes)} classes "
                f"such as {', '.join(classes[:3])}; correct the name."
            )
        if not 0 <= weight < float("inf"):
            raise UserError(
                f"data.class_weights.{name} must be a number of at least 0, but it is {weight}; "
                "0 leaves the class out."
            )
    weights = np.array([setting.get(name, 1.0) for name in classes], dtype=np.float64)
    if not weights.any():
        raise UserError("data.class_weights leaves out every class; give one a weight above 0.")
    return weights


def picks(labels: Ints, weights: Floats, key: int) -> Ints:
    """Return which sample of a window each of its positions shows, with repetition.

    A window of n samples yields n positions, so positions, epochs and resuming are what they are
    without weights. "Once" then means: in each epoch every sample is *offered* once, in one window,
    and taken about n * weight / (sum of the window's weights) times: that number rounded up or
    down, 0 included. Each class of a window gets its expected share rounded up or down too.

    The copies of a sample in one window are shown alike: crop and augmentation are keyed by
    (seed, epoch, sample id).

    A share can only be kept where the class is: one that is missing from a window gets nothing
    there, and a single sample of a rare class is repeated. Two classes, balanced, in windows of
    1,024: one of 1 % of the samples gets 0.49 of the positions, one of 0.1 % gets 0.38, and one of
    0.01 % 0.09, in up to 900 copies of one sample. See `rare_classes`.

    Args:
        labels: of the window's samples in the order of its sections, shape (n,).
        weights: of a sample of each class, shape (classes,), at least 0.
        key: the window's.

    Returns:
        Indexes into `labels`, shape (n,), shuffled.
    """
    count = len(labels)
    # Samples of a class lie together, in a keyed order: which one is rounded up is chance.
    order = shuffled(count, hash_key("balance", key))
    order = order[np.argsort(labels[order], kind="stable")]
    each = weights[labels[order]]
    if not each.any():  # a window that holds only classes that are left out: there is no other
        each = np.ones(count)
    ends = np.cumsum(each / each.max())
    start = hash_key("comb", key) / 2**64
    # Teeth below each end, of n teeth at (start + 0, 1, ...) on a scale from 0 to n.
    teeth = np.ceil(ends * (count / ends[-1]) - start).astype(np.int64)
    teeth = np.clip(teeth, 0, count)
    teeth[np.flatnonzero(each)[-1] :] = count
    taken = order[np.repeat(np.arange(count), np.diff(teeth, prepend=0))]
    return taken[shuffled(count, key)]


def rare_classes(class_samples: Sequence[int], *, window: int) -> list[int]:
    """Return the labels of which a window of that many samples holds less than one on average.

    They get less than their weight asks for, in repetitions of single samples; a larger
    `data.window_chunks` mends it.
    """
    counts = np.array(class_samples, dtype=np.float64)
    rare = (counts > 0) & (counts * window < counts.sum())
    return [int(label) for label in np.flatnonzero(rare)]
