"""What a read task yields: every position once, in order, decoded; bad images named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed import write_packed

from orchestrator.config import Config, DataConfig, TrainConfig, UserError
from orchestrator.data import feeds, plan
from orchestrator.data.render import BLOCK_SCHEMA, Feed


def config(root: Path, **data: object) -> Config:
    settings = DataConfig(
        **{"index": str(root), "global_batch": 7, "image_size": 8, "window_chunks": 2, **data}
    )
    return Config(name="run", data=settings, train=TrainConfig(max_epochs=2))


def blocks(feed: Feed) -> list[dict[str, object]]:
    tasks = plan.tasks(feed.stream, feed.batching, step=0, stop_step=feed.batching.num_steps)
    tables = [table for task in tasks for table in feed.blocks(task)]
    assert all(table.schema == BLOCK_SCHEMA for table in tables)
    assert all(table.num_rows == 1 for table in tables)
    return [table.to_pylist()[0] for table in tables]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_sample_once_an_epoch_in_the_same_order(tmp_path: Path, num_workers: int) -> None:
    index = write_packed(tmp_path)
    feed = feeds.training_feed(config(tmp_path), index, num_workers=num_workers)
    rows = blocks(feed)
    positions = [p for row in rows for p in row["positions"]]
    ids = [i for row in rows for i in row["ids"]]
    assert positions == list(range(80))
    expected = {f"train-{i:04d}" for i in range(40)}
    assert set(ids[:40]) == set(ids[40:]) == expected
    assert ids[:40] != ids[40:]
    single = feeds.training_feed(config(tmp_path), index, num_workers=1)
    assert [i for row in blocks(single) for i in row["ids"]] == ids


def test_pixels_do_not_depend_on_the_world_size_or_the_start(tmp_path: Path) -> None:
    index = write_packed(tmp_path)

    def pixels(num_workers: int, step: int) -> bytes:
        feed = feeds.training_feed(config(tmp_path), index, num_workers=num_workers)
        tasks = plan.tasks(feed.stream, feed.batching, step=step, stop_step=6)
        tables = [table for task in tasks for table in feed.blocks(task)]
        return b"".join(table["pixels"][0].as_py() for table in tables)

    whole = pixels(1, 0)
    assert len(whole) == 42 * 8 * 8 * 3
    assert pixels(3, 0) == whole
    assert pixels(2, 4) == whole[4 * 7 * 8 * 8 * 3 :]


def test_augmentation_differs_by_epoch_and_not_in_evaluation(tmp_path: Path) -> None:
    index = write_packed(tmp_path, train=4, val=4)
    training = feeds.training_feed(config(tmp_path, global_batch=4), index, num_workers=1)
    first, second = blocks(training)
    side = 8 * 8 * 3
    by_id = {i: first["pixels"][k * side : (k + 1) * side] for k, i in enumerate(first["ids"])}
    again = {i: second["pixels"][k * side : (k + 1) * side] for k, i in enumerate(second["ids"])}
    assert any(by_id[i] != again[i] for i in by_id)
    evaluation = feeds.evaluation_feed(
        config(tmp_path), index, split="val", passes=2, num_workers=1
    )
    one, two = blocks(evaluation)
    assert one["pixels"] == two["pixels"]
    assert one["ids"] == [f"val-{i:04d}" for i in range(4)]


def test_a_bad_image_is_named_and_leaves_its_neighbours(tmp_path: Path) -> None:
    index = write_packed(tmp_path, broken={"train-0005": b"not an image", "train-0017": b""})
    feed = feeds.training_feed(config(tmp_path), index, num_workers=2)
    rows = blocks(feed)
    ids = [i for row in rows for i in row["ids"]]
    bad = [entry for row in rows for entry in row["bad"]]
    assert len(ids) == 2 * 38
    assert sorted(entry["id"] for entry in bad) == ["train-0005"] * 2 + ["train-0017"] * 2
    assert {entry["reason"].split(":")[0] for entry in bad} == {"not_an_image", "empty"}
    # The image's place: shard, row group and row within it.
    assert all("00000.parquet#" in entry["uri"] for entry in bad)
    for row in rows:
        assert len(row["pixels"]) == len(row["ids"]) * 8 * 8 * 3


def test_changed_bytes_are_caught_by_the_checksum(tmp_path: Path) -> None:
    index = write_packed(tmp_path)
    path = tmp_path / "train" / "00000.parquet"
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[3] = images[2]
    table = table.set_column(1, "image", pa.array(images, pa.binary()))
    pq.write_table(table, path, row_group_size=8)
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    bad = [entry for row in blocks(feed) for entry in row["bad"]]
    assert {entry["id"] for entry in bad} == {"train-0003"}
    assert bad[0]["reason"].startswith("checksum")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda path: pq.write_table(pq.read_table(path).slice(1), path),
            "rows but the index says",
        ),
        (lambda path: path.write_bytes(b"rubbish"), "not the one that was indexed"),
        (
            lambda path: pq.write_table(pq.read_table(path).drop_columns("checksum"), path),
            "no column 'checksum'",
        ),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_a_shard_that_is_no_longer_the_indexed_one_stops_with_its_name(
    tmp_path: Path, spoil: object, said: str
) -> None:
    index = write_packed(tmp_path, train=8, val=4, shard_rows=8)
    spoil(tmp_path / "train" / "00000.parquet")
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    with pytest.raises(UserError, match=said) as caught:
        blocks(feed)
    assert "00000.parquet" in str(caught.value)


def test_pixels_travel_as_uint8(tmp_path: Path) -> None:
    index = write_packed(tmp_path)
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    row = blocks(feed)[0]
    pixels = np.frombuffer(row["pixels"], dtype=np.uint8)
    assert pixels.size == 7 * 8 * 8 * 3
    assert pixels.max() > 200
