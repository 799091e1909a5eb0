"""The index: read as it was written, refused where it was changed, and flat in memory."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.index import (
    INDEX_FILE,
    Shard,
    ShardColumns,
    Split,
    read_chunks,
    read_index,
    read_shards,
    verify,
    write_index,
)
from orchestrator.data.places import ChunkRef


def make_shard(split, number, chunk_rows, *, content=7, etag=""):
    """Describe a shard; `write` gives it a file of that size."""
    rows = sum(chunk_rows)
    path = f"{split}/{number:03d}.parquet"
    return Shard(split, path, rows, 10 * rows, content, tuple(chunk_rows), etag)


SHARDS = (
    make_shard("train", 0, [4, 4, 2]),
    make_shard("train", 1, [4]),
    make_shard("train", 2, [4, 1]),
    make_shard("val", 0, [3]),
)


def write(folder, shards=SHARDS, classes=("cat", "dog"), **options):
    for shard in shards:
        path = Path(folder, shard.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * shard.bytes)
    return write_index(
        str(folder),
        classes=classes,
        shards=shards,
        settings={"chunk_rows": 4},
        quarantined=1,
        **options,
    )


def test_an_index_is_read_as_it_was_written(tmp_path):
    columns = {"image": "image.bytes", "label": "target"}
    index = write(tmp_path, label_kind="multi", columns=columns, class_samples=[12, 7])
    assert read_index(str(tmp_path)) == index
    assert index.classes == ("cat", "dog")
    assert index.class_samples == (12, 7)
    assert index.label_kind == "multi"
    assert index.columns == columns
    assert index.settings == {"chunk_rows": 4}
    assert index.quarantined == 1
    assert index.splits == {"train": Split(19, 6, 3, 190), "val": Split(3, 1, 1, 30)}
    assert read_shards(index) == list(SHARDS)
    verify(index)


def test_packing_writes_these_columns(tmp_path):
    names = ["id", "image", "label", "checksum"]
    assert write(tmp_path / "a").columns == dict(zip(names, names, strict=True))
    assert "label" not in write(tmp_path / "b", label_kind="none").columns


def test_shards_with_any_row_groups_come_back(tmp_path):
    rng = np.random.default_rng(0)
    shards = [
        make_shard("train", i, rng.integers(1, 4, size=rng.integers(1, 9)).tolist(), etag=f"e{i}")
        for i in range(300)
    ]
    index = write(tmp_path, shards)
    assert read_shards(index) == shards
    rows = [n for shard in shards for n in shard.chunk_rows]
    sizes = read_chunks(index, "train").sizes
    assert sizes.rows(np.arange(len(rows))).tolist() == rows
    assert sizes.num_samples == sum(rows)
    assert len(sizes.odd_chunks) == sum(n != sizes.usual_rows for n in rows) < 0.67 * len(rows)


def test_shards_collected_in_columns_make_the_same_index(tmp_path):
    columns = ShardColumns(SHARDS[2:])
    for shard in SHARDS[:2]:
        columns.add(shard)
    index = write_index(
        str(tmp_path / "a"), classes=("cat", "dog"), shards=columns, settings={}, quarantined=0
    )
    assert index.digest == write(tmp_path / "b").digest
    assert read_shards(index) == list(SHARDS)


def test_the_digest_does_not_depend_on_the_order_or_the_place(tmp_path):
    index = write(tmp_path / "a")
    assert write(tmp_path / "b", SHARDS[::-1]).digest == index.digest
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert read_index(str(tmp_path / "c")).digest == index.digest


def test_the_digest_does_not_depend_on_how_the_table_is_cut(tmp_path):
    index = write(tmp_path)
    pq.write_table(pq.read_table(tmp_path / index.table), tmp_path / index.table, row_group_size=1)
    verify(index)
    chunks = read_chunks(index, "val")
    assert chunks.locate(np.array([0])) == [ChunkRef(f"{tmp_path}/val/000.parquet", 0, 3, 30)]


@pytest.mark.parametrize(
    ("shards", "options"),
    [
        (SHARDS[:-1], {}),
        (SHARDS, {"classes": ("cat", "emu")}),
        ((*SHARDS[:-1], make_shard("val", 0, [2, 1])), {}),
        ((*SHARDS[:-1], make_shard("val", 0, [1, 1, 1])), {}),
        ((*SHARDS[:-1], make_shard("val", 0, [3], content=8)), {}),
        ((*SHARDS[:-1], make_shard("val", 0, [3], etag="e")), {}),
        (SHARDS, {"label_kind": "multi"}),
        (SHARDS, {"columns": {"image": "image.bytes"}}),
        (SHARDS, {"class_samples": (1, 2)}),
    ],
    ids=["shards", "classes", "chunks", "chunks", "content", "etag", "kind", "columns", "counts"],
)
def test_the_digest_depends_on_all_that_decides_training(tmp_path, shards, options):
    assert write(tmp_path / "b", shards, **options).digest != write(tmp_path / "a").digest


def test_chunks_are_located_in_their_shards(tmp_path):
    chunks = read_chunks(write(tmp_path), "train")
    assert chunks.sizes.rows(np.arange(6)).tolist() == [4, 4, 2, 4, 4, 1]
    places = [(0, 0, 4, 100), (0, 1, 4, 100), (0, 2, 2, 100)]
    places += [(1, 0, 4, 40), (2, 0, 4, 50), (2, 1, 1, 50)]
    expected = [ChunkRef(f"{tmp_path}/train/{n:03d}.parquet", *place) for n, *place in places]
    assert chunks.locate(np.arange(6)) == expected
    assert chunks.locate(np.array([5, 0, 5])) == [expected[5], expected[0], expected[5]]
    assert read_chunks(read_index(str(tmp_path)), "val").locate(np.array([0]))[0].rows == 3


def test_a_file_indexed_in_place_keeps_its_own_uri(tmp_path):
    places = ["/data/a.parquet", "s3://bucket/b.parquet"]
    shards = [dataclasses.replace(SHARDS[1], path=place) for place in places]
    index = write_index(str(tmp_path), classes=(), shards=shards, settings={}, quarantined=0)
    refs = read_chunks(index, "train").locate(np.arange(2))
    assert [ref.uri for ref in refs] == places


def test_a_split_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no split 'test', only train, val; .*--test-fraction"):
        read_chunks(write(tmp_path), "test")


@pytest.mark.parametrize(
    ("shards", "options", "message"),
    [
        ([], {}, "would be an index without chunks"),
        ([make_shard("train", 0, [])], {}, r"shard train/000\.parquet has no row group"),
        ([make_shard("train", 0, [4, 0, 4])], {}, "or one without rows"),
        (SHARDS, {"class_samples": [5, 5, 9]}, "go up to 2 but there are only 2 class names"),
    ],
)
def test_what_cannot_be_trained_on_gets_no_index(tmp_path, shards, options, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, shards, **options)
    assert not Path(tmp_path, INDEX_FILE).exists()


def test_a_folder_without_an_index_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"holds no INDEX\.json, .*`orchestrator pack --source"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-5], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: json.dumps({**json.loads(text), "splits": []}), "is damaged"),
        (lambda text: json.dumps({**json.loads(text), "splits": {}}), "index without chunks"),
        (lambda text: json.dumps({**json.loads(text), "format": 1}), "has format 1, not 2"),
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
    with pytest.raises(UserError, match=r"has 12 samples of split .train. but INDEX\.json says 19"):
        read_chunks(index, "train")
    pq.write_table(table.drop_columns("etag"), tmp_path / index.table)
    with pytest.raises(UserError, match="is damaged"):
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


def test_a_file_in_place_that_was_written_again_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"x" * 40)
    shard = dataclasses.replace(SHARDS[1], path=str(file), etag=storage.etag(str(file)))
    uri = str(tmp_path / "index")
    index = write_index(uri, classes=(), shards=[shard], settings={}, quarantined=0)
    verify(index)
    file.write_bytes(b"y" * 40)
    os.utime(file, (1, 1))
    with pytest.raises(UserError, match=r"a\.parquet was written again but the index says"):
        verify(index)
