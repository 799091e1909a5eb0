"""What a read task yields: every position once, in order, decoded; bad images named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed import write_packed

from orchestrator.config import Config, DataConfig, TrainConfig, UserError
from orchestrator.data import feeds
from orchestrator.data.feeds import Feed
from orchestrator.data.render import block_schema


def config(root: Path, **data: object) -> Config:
    settings = DataConfig(
        **{"index": str(root), "global_batch": 7, "image_size": 8, "window_chunks": 2, **data}
    )
    return Config(name="run", data=settings, train=TrainConfig(max_epochs=2))


def blocks(feed: Feed) -> list[dict[str, object]]:
    works = feed.works(step=0, stop_step=feed.batching.num_steps)
    tables = [table for work in works for table in feed.reader.blocks(work)]
    assert all(table.schema == block_schema("class") for table in tables)
    assert all(table.num_rows == 1 for table in tables)
    return [table.to_pylist()[0] for table in tables]


def in_order(rows: list[dict[str, object]]) -> list[str]:
    """Return the ids at positions 0, 1, 2, ... of all blocks together."""
    ids = {p: i for row in rows for p, i in zip(row["positions"], row["ids"], strict=True)}
    assert sorted(ids) == list(range(sum(len(row["ids"]) for row in rows)))
    return [ids[position] for position in range(len(ids))]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_sample_once_an_epoch_in_the_same_order(tmp_path: Path, num_workers: int) -> None:
    index = write_packed(tmp_path)
    feed = feeds.training_feed(config(tmp_path), index, num_workers=num_workers)
    rows = blocks(feed)
    ids = in_order(rows)
    expected = {f"train-{i:04d}" for i in range(40)}
    assert set(ids[:40]) == set(ids[40:]) == expected
    assert ids[:40] != ids[40:]
    single = feeds.training_feed(config(tmp_path), index, num_workers=1)
    assert in_order(blocks(single)) == ids


def test_pixels_do_not_depend_on_the_world_size_or_the_start(tmp_path: Path) -> None:
    index = write_packed(tmp_path)

    def pixels(num_workers: int, step: int) -> bytes:
        feed = feeds.training_feed(config(tmp_path), index, num_workers=num_workers)
        pixels = {}
        for work in feed.works(step=step, stop_step=6):
            for table in feed.reader.blocks(work):
                shown = np.frombuffer(table["pixels"][0].as_py(), dtype=np.uint8)
                positions = table["positions"][0].as_py()
                pixels |= zip(positions, shown.reshape(len(positions), -1), strict=True)
        return b"".join(pixels[position].tobytes() for position in sorted(pixels))

    whole = pixels(1, 0)
    assert len(whole) == 42 * 8 * 8 * 3
    assert pixels(3, 0) == whole
    assert pixels(2, 4) == whole[4 * 7 * 8 * 8 * 3 :]


def test_augmentation_differs_by_epoch_and_not_in_evaluation(tmp_path: Path) -> None:
    index = write_packed(tmp_path, train=4, val=4)
    training = feeds.training_feed(config(tmp_path, global_batch=4), index, num_workers=1)
    first, second = pixels_by_epoch(training)
    assert first.keys() == second.keys()
    assert any(first[i] != second[i] for i in first)
    evaluation = feeds.evaluation_feed(
        config(tmp_path), index, split="val", passes=2, num_workers=1
    )
    one, two = pixels_by_epoch(evaluation)
    assert one == two
    assert list(one) == [f"val-{i:04d}" for i in range(4)]


def pixels_by_epoch(feed: Feed) -> list[dict[str, bytes]]:
    """Return, for each epoch of the feed, the pixels of every id."""
    found: dict[int, dict[str, bytes]] = {}
    for row in blocks(feed):
        shown = np.frombuffer(row["pixels"], dtype=np.uint8).reshape(len(row["ids"]), -1)
        for epoch, name, pixels in zip(row["epochs"], row["ids"], shown, strict=True):
            found.setdefault(epoch, {})[name] = pixels.tobytes()
    return [found[epoch] for epoch in sorted(found)]


def test_a_bad_image_is_named_and_leaves_its_neighbours(tmp_path: Path) -> None:
    index = write_packed(tmp_path, broken={"train-0005": b"not an image", "train-0017": b""})
    feed = feeds.training_feed(config(tmp_path), index, num_workers=2)
    rows = blocks(feed)
    ids = [i for row in rows for i in row["ids"]]
    bad = [entry for row in rows for entry in row["bad"]]
    assert len(ids) == 2 * 38
    assert sorted(entry["id"] for entry in bad) == ["train-0005"] * 2 + ["train-0017"] * 2
    assert {entry["reason"].split(":")[0] for entry in bad} == {"not_an_image", "empty"}
    assert {entry["first_bytes"] for entry in bad} == {b"not an image".hex(), ""}
    assert sorted(entry["epoch"] for entry in bad) == [0, 0, 1, 1]
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
    assert pixels.size == len(row["ids"]) * 8 * 8 * 3
    assert pixels.max() > 200
