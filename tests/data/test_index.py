import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from orchestrator.config import UserError
from orchestrator.data.index import (
    INDEX_FILE,
    Shard,
    Split,
    read_chunks,
    read_index,
    read_shards,
    verify,
    write_index,
)


def make_shard(split, number, chunk_rows, *, content=7):
    """Describe a shard; `write` gives it a file of that size."""
    rows = sum(chunk_rows)
    path = f"{split}/{number:03d}.parquet"
    return Shard(split, path, rows, 10 * rows, content, tuple(chunk_rows))


SHARDS = (
    make_shard("train", 0, [4, 4, 2]),
    make_shard("train", 1, [4]),
    make_shard("train", 2, [4, 1]),
    make_shard("val", 0, [3]),
)


def write(folder, shards=SHARDS, classes=("cat", "dog")):
    for shard in shards:
        path = Path(folder, shard.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * shard.bytes)
    return write_index(
        str(folder), classes=classes, shards=shards, settings={"chunk_rows": 4}, quarantined=1
    )


def test_an_index_is_read_as_it_was_written(tmp_path):
    index = write(tmp_path)
    assert read_index(str(tmp_path)) == index
    assert index.classes == ("cat", "dog")
    assert index.settings == {"chunk_rows": 4}
    assert index.quarantined == 1
    assert index.splits == {"train": Split(19, 6, 3, 190), "val": Split(3, 1, 1, 30)}
    assert read_shards(index) == list(SHARDS)
    verify(index)


def test_the_digest_does_not_depend_on_the_order_or_the_place(tmp_path):
    index = write(tmp_path / "a")
    assert write(tmp_path / "b", SHARDS[::-1]).digest == index.digest
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert read_index(str(tmp_path / "c")).digest == index.digest


@pytest.mark.parametrize(
    ("shards", "classes"),
    [
        (SHARDS[:-1], ("cat", "dog")),
        (SHARDS, ("cat", "emu")),
        ((*SHARDS[:-1], make_shard("val", 0, [2, 1])), ("cat", "dog")),
        ((*SHARDS[:-1], make_shard("val", 0, [3], content=8)), ("cat", "dog")),
    ],
    ids=["fewer shards", "other class", "other chunks", "other images"],
)
def test_the_digest_depends_on_all_that_decides_training(tmp_path, shards, classes):
    assert write(tmp_path / "b", shards, classes).digest != write(tmp_path / "a").digest


def test_a_chunk_is_located_in_its_shard(tmp_path):
    chunks = read_chunks(write(tmp_path), "train")
    assert chunks.sizes.rows(np.arange(6)).tolist() == [4, 4, 2, 4, 4, 1]
    assert [chunks.locate(i) for i in range(6)] == [
        (f"{tmp_path}/train/{shard:03d}.parquet", group)
        for shard, group in [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    ]
    assert read_chunks(read_index(str(tmp_path)), "val").locate(0)[0].endswith("val/000.parquet")


def test_a_split_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no split 'test', only train, val; .*--test-fraction"):
        read_chunks(write(tmp_path), "test")


def test_a_folder_without_an_index_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"holds no INDEX\.json, .*`orchestrator pack --source"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-5], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: json.dumps({**json.loads(text), "format": 99}), "has another format"),
        (lambda text: json.dumps({**json.loads(text), "more": 1}), "is damaged"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage, message):
    write(tmp_path)
    path = tmp_path / INDEX_FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message):
        read_index(str(tmp_path))


def test_a_changed_shard_table_is_refused(tmp_path):
    index = write(tmp_path)
    table = pq.read_table(tmp_path / index.table)
    pq.write_table(table.slice(1), tmp_path / index.table)
    with pytest.raises(UserError, match="does not have the digest"):
        verify(index)
    (tmp_path / index.table).write_bytes(b"no Parquet")
    with pytest.raises(UserError, match="is damaged"):
        read_chunks(index, "train")


def test_a_shard_that_is_not_the_indexed_one_is_refused(tmp_path):
    index = write(tmp_path)
    path = tmp_path / SHARDS[1].path
    path.write_bytes(b"x" * 39)
    with pytest.raises(UserError, match=r"001\.parquet has 39 bytes but the index says 40 bytes"):
        verify(index)
    os.unlink(path)
    with pytest.raises(UserError, match=r"001\.parquet is missing but the index says"):
        verify(index)
