"""What reading holds is held against the cluster's memory before anything starts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from packed import write_packed

from orchestrator.config import Config, DataConfig, ScalingConfig, UserError
from orchestrator.data.index import Index, Split
from orchestrator.train.strategies.capacity import Memory, check_memory

GB = 10**9


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Return an index of a million photographs of 100 kB in chunks of 64."""
    small = write_packed(tmp_path)
    train = Split(samples=10**6, chunks=15_625, shards=250, bytes=100 * GB)
    return dataclasses.replace(small, splits={**small.splits, "train": train})


def config(**data: Any) -> Config:
    return Config(data=DataConfig(**data), scaling=ScalingConfig(num_workers=2))


def test_the_defaults_fit_a_laptop(index: Index) -> None:
    check_memory(config(), index, Memory(16 * GB, 4 * GB), slots=4)


def test_a_window_larger_than_the_memory_is_refused(index: Index) -> None:
    with pytest.raises(UserError, match=r"data\.window_chunks=512: .* 3\.28 GB, and 4 read"):
        check_memory(config(window_chunks=512), index, Memory(16 * GB, 4 * GB), slots=4)
    check_memory(config(window_chunks=512), index, Memory(64 * GB, 4 * GB), slots=4)


def test_blocks_that_do_not_fit_the_object_store_are_refused(index: Index) -> None:
    large = config(image_size=1024, max_micro_batch=256, global_batch=512)
    with pytest.raises(UserError, match=r"data\.max_micro_batch=256 of 1024 x 1024 .* 0\.81 GB"):
        check_memory(large, index, Memory(64 * GB, 4 * GB), slots=4)
    check_memory(large, index, Memory(64 * GB, 11 * GB), slots=4)
