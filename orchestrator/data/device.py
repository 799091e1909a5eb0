"""Worker side: a micro-batch of uint8 pixels -> what the user's module gets, on its device."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.config import DataConfig
from orchestrator.data.augmentation import augment
from orchestrator.data.augmentation.boxes import Mix
from orchestrator.data.batch import MicroBatch
from orchestrator.data.index import LabelKind

T = TypeVar("T")

# Rows of a block, on a CPU: 112 rows of 224 pixels are 300 kB as floats and stay in a level 2
# cache. Measured with 28, 56, 112 and 224: 0.22, 0.15, 0.12 and 0.12 of three whole passes.
_BLOCK_FLOATS = 112 * 224 * 3
# The batch that is trained on, the one made next, and one that a callback may keep.
_MAX_BUFFERS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """A batch on its way to the device."""

    batch: dict[str, Any]
    ready: Any
    """CUDA event after which it may be read; None: it may be read now."""

    def wait(self) -> dict[str, Any]:
        """Return the batch; what the current stream does next waits for it, the CPU does not."""
        if self.ready is not None:
            compute = torch.cuda.current_stream(self.batch["image"].device)
            compute.wait_event(self.ready)
            for tensor in self.batch.values():
                if isinstance(tensor, torch.Tensor):
                    # Its memory is of the side stream, which must not reuse it too early.
                    tensor.record_stream(compute)
        return self.batch


class ToDevice:
    """Move uint8 pixels to the training device, augment and normalise them there.

    On CUDA, pixels go through pinned memory that is reused, and copy, augmentation and
    normalisation run on a side stream, beside the step that is being computed (see `Ahead`). That
    path is not covered by CI, which has no GPU.

    Args:
        device: where the model is.
        data: sizes, normalisation and augmentation.
        label_kind: of the index.
        num_classes: of the index; columns of multi-hot and of mixed labels.
        seed: keys the augmentation; None: there is none, as in validation.
    """

    def __init__(
        self,
        device: torch.device,
        data: DataConfig,
        *,
        label_kind: LabelKind = "class",
        num_classes: int = 0,
        seed: int | None = None,
    ) -> None:
        self.device = device
        self._label_kind = label_kind
        self._num_classes = num_classes
        is_augmented = seed is not None and augment.is_on(data.augment)
        self._augment = augment.Augment(data, seed or 0) if is_augmented else None
        self._normalise = Normalise(device, data)
        self._staging = _Staging(device) if device.type == "cuda" else None

    def __call__(self, batch: MicroBatch) -> dict[str, Any]:
        """Return {"image": float32 (n, 3, S, S) channels-last, "label": ..., "id": [str]}.

        Labels are int64 (n,) for classes, float32 (n, num_classes) multi-hot for several,
        float32 (n,) for targets; the key is absent where there are none. With mixup or cutmix
        those of classes are float32 (n, num_classes) as well and add up to 1.
        """
        return self.start(batch).wait()

    def start(self, batch: MicroBatch) -> Pending:
        """Begin what calling does; the result may be waited for while a step is computed."""
        if self._staging is None:
            return Pending(self._build(batch, batch.pixels), None)
        with torch.cuda.stream(self._staging.stream):
            built = self._build(batch, self._staging.copy(batch.pixels))
            return Pending(built, self._staging.stream.record_event())

    def _build(self, batch: MicroBatch, pixels: torch.Tensor) -> dict[str, Any]:
        augmented = self._augment(pixels, batch) if self._augment else None
        mix = augmented.mix if augmented else None
        image = self._normalise(pixels if augmented is None else augmented.pixels)
        if augmented is not None and augmented.mix and augmented.mix.blended.size:
            assert augmented.partners is not None
            _blend(image, self._normalise(augmented.partners), augmented.mix)
        built = {"image": image, "id": batch.ids}
        if self._label_kind != "none":
            labels = encode_labels(batch.labels, self._label_kind, self._num_classes)
            if mix is not None:
                labels = mixed_labels(labels, mix.weight, self._num_classes)
            built["label"] = labels.to(self.device, non_blocking=True)
        return built


def _blend(image: torch.Tensor, partners: torch.Tensor, mix: Mix) -> None:
    index = torch.from_numpy(mix.blended).to(image.device)
    weight = mix.weight[mix.blended].astype(np.float32)
    own = torch.from_numpy(weight)[:, None].to(image.device)
    flat, other = (each.permute(0, 2, 3, 1).flatten(1) for each in (image, partners))
    flat.index_copy_(0, index, flat.index_select(0, index).mul_(own).add_(other.mul_(1 - own)))


def encode_labels(labels: list[Any], kind: LabelKind, num_classes: int) -> torch.Tensor:
    """Return labels as a tensor on the host; None, which a stand-in has, is class 0 or nothing."""
    if kind == "class":
        return torch.tensor([label or 0 for label in labels], dtype=torch.int64)
    if kind == "float":
        return torch.tensor([label or 0.0 for label in labels], dtype=torch.float32)
    hot = torch.zeros(len(labels), num_classes)
    rows = [row for row, label in enumerate(labels) for _ in label or []]
    hot[rows, [each for label in labels for each in label or []]] = 1
    return hot


def mixed_labels(
    labels: torch.Tensor, weight: npt.NDArray[np.float64], num_classes: int
) -> torch.Tensor:
    """Return float32 (n, num_classes): each row's own label and its neighbour's, weighted.

    Args:
        labels: int64 (n,) or float32 (n, num_classes).
        weight: of the row's own label, shape (n,).
        num_classes: columns.
    """
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels, num_classes)
    own = torch.from_numpy(weight)[:, None]
    return (labels * own + labels.roll(1, 0) * (1 - own)).to(torch.float32)


class Normalise:
    """uint8 (n, S, S, 3) -> float32 (n, 3, S, S) channels-last: minus mean, times 1 / std."""

    def __init__(self, device: torch.device, data: DataConfig) -> None:
        # One row of an image: broadcasting over 3 channels instead makes loops of 3 steps.
        mean, std = torch.tensor(data.mean) * 255, torch.tensor(data.std) * 255
        self._mean = mean.repeat(data.image_size).to(device)
        self._scale = (1 / std).repeat(data.image_size).to(device)
        self._block_rows = max(1, _BLOCK_FLOATS // len(self._mean))
        self._block = torch.empty(self._block_rows, len(self._mean), device=device)
        self._buffers = _Buffers()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the normalised images."""
        rows = pixels.view(-1, len(self._mean))
        if pixels.is_cuda:
            floats = rows.to(torch.float32).sub_(self._mean).mul_(self._scale)
        else:
            floats = self._in_blocks(rows)
        return floats.view(pixels.shape).permute(0, 3, 1, 2)

    def _in_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Make one pass over memory where whole-tensor operations make three."""
        floats = self._buffers.take(rows.numel()).view(rows.shape)
        for first in range(0, len(rows), self._block_rows):
            part = slice(first, min(first + self._block_rows, len(rows)))
            block, out = self._block[: part.stop - first], floats[part]
            block.copy_(rows[part])
            block.sub_(self._mean)
            torch.mul(block, self._scale, out=out)
        return floats


class _Buffers:
    """Memory of batches, handed out again once nothing else refers to it.

    Fresh memory costs more than the arithmetic: of 11 ms for 64 images of 224 pixels, 7 ms were
    page faults.
    """

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.float32]] = []

    def take(self, size: int) -> torch.Tensor:
        """Return `size` floats of any content."""
        for array in self._arrays:
            if sys.getrefcount(array) == _FREE_REFERENCES and array.size >= size:
                return torch.from_numpy(array)[:size]
        array = np.empty(size, dtype=np.float32)
        # Smaller ones will not be asked for again, larger ones that are held are left behind.
        self._arrays = [array, *self._arrays[: _MAX_BUFFERS - 1]]
        return torch.from_numpy(array)


def _count_references() -> int:
    """Return how many references an array has that only a list and a loop over it hold."""
    arrays = [np.empty(0, dtype=np.float32)]
    for array in arrays:
        return sys.getrefcount(array)
    raise AssertionError


# 3 up to Python 3.13; later ones count a local variable less. A tensor's storage adds one.
_FREE_REFERENCES = _count_references()


class _Staging:
    """Two pieces of pinned host memory in turns, and the stream that copies from them.

    `pin_memory()` for each batch would lock and map pages each time.
    """

    def __init__(self, device: torch.device) -> None:
        # Torch gives these two constructors no types.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._memory = [torch.empty(0, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device; the copying itself goes on in the background."""
        self._memory.reverse()
        self._copied.reverse()
        self._copied[0].synchronize()
        if self._memory[0].numel() < pixels.numel():
            self._memory[0] = torch.empty(pixels.numel(), dtype=torch.uint8, pin_memory=True)
        staged = self._memory[0][: pixels.numel()].view(pixels.shape)
        staged.copy_(pixels)
        moved = staged.to(self._device, non_blocking=True)
        self._copied[0].record(self.stream)
        return moved


class Ahead(Generic[T]):
    """Batches on the device, one more of them on its way than is trained on.

    Args:
        items: micro-batches, each with what the consumer wants to know when it gets it.
        to_device: what moves them.
        depth: batches under way ahead of the consumer; None: 1 on CUDA, where copies run beside
            the step, and 0 elsewhere, where it would only cost memory.
    """

    def __init__(
        self,
        items: Iterator[tuple[T, MicroBatch]],
        to_device: ToDevice,
        *,
        depth: int | None = None,
    ) -> None:
        self._items = items
        self._to_device = to_device
        self._depth = int(to_device.device.type == "cuda") if depth is None else depth
        self._under_way: list[tuple[T, Pending]] = []

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> tuple[T, dict[str, Any]]:
        """Return the next batch; nothing is drawn from `items` before the first call."""
        while len(self._under_way) <= self._depth:
            item = next(self._items, None)
            if item is None:
                break
            self._under_way.append((item[0], self._to_device.start(item[1])))
        if not self._under_way:
            raise StopIteration
        about, pending = self._under_way.pop(0)
        return about, pending.wait()
