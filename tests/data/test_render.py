"""What a read task yields: every position once, in order, decoded; bad images named."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
    content = bytearray(path.read_bytes())
    image = pq.read_table(path)["image"][3].as_py()
    content[content.index(image) + len(image) // 2] ^= 1
    path.write_bytes(content)
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    bad = [entry for row in blocks(feed) for entry in row["bad"]]
    assert {entry["id"] for entry in bad} == {"train-0003"}
    assert bad[0]["reason"].startswith("checksum")


def shorter(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def rubbish(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(shorter, "changed"), (rubbish, "damaged"), (Path.unlink, "missing")],
)
def test_a_shard_that_is_no_longer_the_indexed_one_is_bad_as_a_whole(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    index = write_packed(tmp_path, train=16, val=4, shard_rows=8)
    spoil(tmp_path / "train" / "00000.parquet")
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    rows = blocks(feed)
    bad = [entry for row in rows for entry in row["bad"]]
    uri = f"{tmp_path}/train/00000.parquet#0"
    assert sorted({entry["id"] for entry in bad}) == [f"{uri}#{row}" for row in range(8)]
    assert len(bad) == 16  # of two epochs
    assert all(entry["reason"].startswith(f"{reason}: ") for entry in bad)
    # The neighbours are all there.
    assert {i for row in rows for i in row["ids"]} == {f"train-{i:04d}" for i in range(8, 16)}


def test_a_shard_without_a_column_stops_with_its_name(tmp_path: Path) -> None:
    index = write_packed(tmp_path, train=8, val=4, shard_rows=8)
    index = dataclasses.replace(index, columns={**index.columns, "checksum": "sha"})
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    with pytest.raises(UserError, match=r"00000\.parquet has no column 'sha'"):
        blocks(feed)


def test_pixels_travel_as_uint8(tmp_path: Path) -> None:
    index = write_packed(tmp_path)
    feed = feeds.training_feed(config(tmp_path), index, num_workers=1)
    row = blocks(feed)[0]
    pixels = np.frombuffer(row["pixels"], dtype=np.uint8)
    assert pixels.size == len(row["ids"]) * 8 * 8 * 3
    assert pixels.max() > 200
