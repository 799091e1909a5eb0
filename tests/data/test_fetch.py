"""A chunk is looked at twice before it is given up, and each of its samples has a name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import write_packed

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.fetch import Layout, Lost, Whole
from orchestrator.data.index import Index, read_chunks
from orchestrator.data.places import ChunkRef


def layout(index: Index, **changes: Any) -> Layout:
    return Layout(
        **{"columns": index.columns, "label_kind": "class", "classes": index.classes, **changes}
    )


def first_chunk(index: Index) -> ChunkRef:
    return read_chunks(index, "train").locate(np.array([0]))[0]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_packed(tmp_path, train=16, val=4)


def spoil(monkeypatch: pytest.MonkeyPatch, responses: int) -> list[int]:
    """Overwrite the middle of the first responses; return a list that counts all of them."""
    honest, seen = storage.read_ranges, []

    def read(uri: str, ranges: Sequence[tuple[int, int]], **options: Any) -> list[memoryview]:
        seen.append(1)
        parts = honest(uri, ranges, **options)
        if len(seen) > responses:
            return parts
        spoilt = [bytearray(part) for part in parts]
        for part in spoilt:
            part[: len(part) // 2] = bytes(len(part) // 2)
        return [memoryview(bytes(part)) for part in spoilt]

    monkeypatch.setattr(storage, "read_ranges", read)
    return seen


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("responses", [1, 2])
def test_what_was_damaged_on_its_way_is_read_again(
    index: Index, monkeypatch: pytest.MonkeyPatch, weights: Any, responses: int
) -> None:
    spoil(monkeypatch, responses)
    chunk, _ = layout(index, class_weights=weights).read(first_chunk(index))
    assert isinstance(chunk, Whole)
    assert chunk.changed == frozenset()
    assert chunk.ids == [f"train-{i:04d}" for i in range(8)]


def test_what_stays_damaged_is_lost_and_with_weights_ends_the_run(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1000)
    chunk, _ = layout(index).read(first_chunk(index))
    assert isinstance(chunk, Lost)
    with pytest.raises(UserError, match=r"row group 0 cannot be read .*data\.class_weights"):
        layout(index, class_weights=(1.0, 1.0, 1.0)).read(first_chunk(index))


def test_a_sample_without_an_id_is_named_by_its_place(tmp_path: Path, index: Index) -> None:
    ref = first_chunk(index)
    columns = {name: column for name, column in index.columns.items() if name != "id"}
    chunk, _ = layout(index, columns=columns).read(ref)
    assert isinstance(chunk, Whole)
    assert chunk.ids == [f"{ref.uri}#0#{row}" for row in range(8)]
