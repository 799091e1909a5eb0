"""Pixels and labels as training_step gets them."""

from collections.abc import Iterator

import pytest
import torch
from pictures import micro_batch

from orchestrator.config import DataConfig
from orchestrator.data.batch import MicroBatch
from orchestrator.data.device import Ahead, ToDevice, encode_labels

CPU = torch.device("cpu")


def to_device(side: int = 32) -> ToDevice:
    return ToDevice(CPU, DataConfig(image_size=side))


@pytest.mark.parametrize(("rows", "side"), [(64, 32), (1, 32), (3, 7), (64, 97)])
def test_pixels_are_normalised_to_the_last_bit_and_channels_last(rows: int, side: int) -> None:
    data, batch = DataConfig(image_size=side), micro_batch(range(rows), side=side)
    image = to_device(side)(batch)["image"]
    mean = torch.tensor(data.mean).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(data.std).view(1, 3, 1, 1) * 255)
    expected = batch.pixels.permute(0, 3, 1, 2).to(torch.float32).sub_(mean).mul_(scale)
    assert image.dtype == torch.float32
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image, expected)


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    move = to_device()
    first = move(micro_batch(range(8)))["image"]
    kept = first.clone()
    second = move(micro_batch(range(8, 16)))["image"]
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    address, part = second.data_ptr(), second[2:3, :, ::2]
    del second
    third = move(micro_batch(range(16, 24)))["image"]
    assert third.data_ptr() != address  # a view of it is still held
    del part
    assert move(micro_batch(range(4)))["image"].data_ptr() == address
    held = [move(micro_batch(range(8)))["image"] for _ in range(9)]
    assert len({image.data_ptr() for image in [first, third, *held]}) == 11
    assert torch.equal(first, kept)


def test_memory_that_autograd_needs_is_not_used_again() -> None:
    move, layer = to_device(), torch.nn.Conv2d(3, 4, 3)
    losses = [layer(move(micro_batch(range(i, i + 8)))["image"]).square().mean() for i in range(5)]
    for i, loss in enumerate(losses):
        again = layer(to_device()(micro_batch(range(i, i + 8)))["image"]).square().mean()
        (found,) = torch.autograd.grad(loss, [layer.weight])
        (expected,) = torch.autograd.grad(again, [layer.weight])
        assert torch.equal(found, expected)


def test_labels_of_each_kind() -> None:
    several = encode_labels([[1, 3], [], [0], None], "multi", 4)
    assert several.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert several.dtype == torch.float32
    targets = encode_labels([0.5, -2, None], "float", 0)
    assert targets.tolist() == [0.5, -2, 0]
    assert targets.dtype == torch.float32
    classes = encode_labels([2, 0, None], "class", 3)
    assert classes.tolist() == [2, 0, 0]
    assert classes.dtype == torch.int64


def test_no_labels_no_key() -> None:
    move = ToDevice(CPU, DataConfig(image_size=32), label_kind="none")
    assert move(micro_batch([1, 2])).keys() == {"image", "id"}


@pytest.mark.parametrize("depth", [None, 0, 1, 2])
def test_batches_come_in_order_with_what_belongs_to_them(depth: int | None) -> None:
    drawn: list[int] = []

    def items() -> Iterator[tuple[int, MicroBatch]]:
        for number in range(5):
            drawn.append(number)
            yield number, micro_batch([number, number + 1])

    ahead = Ahead(items(), to_device(), depth=depth)
    assert drawn == []
    for expected in range(5):
        number, batch = next(ahead)
        assert number == expected
        assert batch["id"] == [str(number), str(number + 1)]
        assert torch.equal(batch["image"], to_device()(micro_batch([number, number + 1]))["image"])
        assert drawn == list(range(min(5, expected + 1 + (depth or 0))))
    assert list(ahead) == []
