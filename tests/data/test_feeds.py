"""What a config makes a run read: mixes of indexes, samples weighted by class."""

import collections
from pathlib import Path
from typing import Any

import pytest
from packed import write_packed

from orchestrator.config import Config, DataConfig, MixPart, TrainConfig, UserError
from orchestrator.data import feeds
from orchestrator.data.feeds import Feed
from orchestrator.data.sources import read_data


def make_feed(*, workers: int = 1, epochs: int = 1, **data: Any) -> Feed:
    settings = {"global_batch": 10, "image_size": 8, "window_chunks": 4, **data}
    config = Config(data=DataConfig(**settings), train=TrainConfig(max_epochs=epochs))
    return feeds.training_feed(config, read_data(config.data), num_workers=workers)


def read(feed: Feed) -> list[tuple[int, str, int]]:
    """Return (position, URI of the sample's shard, label) of all samples, by position."""
    found = []
    for work in feed.works(step=0, stop_step=feed.batching.num_steps):
        for block in feed.reader.blocks(work):
            row = block.to_pylist()[0]
            found += zip(row["positions"], row["ids"], row["labels"], strict=True)
    return sorted(found)


def test_a_mix_is_read_in_its_shares_and_each_part_once_an_epoch_of_its_own(tmp_path: Path) -> None:
    many = write_packed(tmp_path / "many", train=90, val=8)
    few = write_packed(tmp_path / "few", train=30, val=8, prefix="few-")
    mix = (MixPart(index=many.uri, weight=1), MixPart(index=few.uri, weight=1))
    feed = make_feed(mix=mix)
    assert feed.samples_per_epoch == 120
    ids = [name for _, name, _ in read(feed)]
    assert len(ids) == 120
    counts = collections.Counter(ids)
    of_few = {name: n for name, n in counts.items() if name.startswith("few-")}
    assert sum(of_few.values()) == 60
    assert set(of_few.values()) == {2}  # 60 draws of 30 samples: two epochs of their own
    of_many = {name: n for name, n in counts.items() if not name.startswith("few-")}
    assert set(of_many.values()) == {1}
    for start in range(0, 120, 40):
        share = sum(name.startswith("few-") for name in ids[start : start + 40])
        assert 10 <= share <= 30
    assert read(make_feed(mix=mix, workers=3)) == read(feed)


@pytest.mark.parametrize("workers", [1, 3])
def test_weighted_sampling_repeats_and_leaves_out_by_class(tmp_path: Path, workers: int) -> None:
    index = write_packed(tmp_path, train=90, val=8)
    weights = {"class-0": 2.0, "class-1": 1.0, "class-2": 0.0}
    feed = make_feed(index=index.uri, class_weights=weights, epochs=2, workers=workers)
    rows = read(feed)
    assert [position for position, _, _ in rows] == list(range(180))
    labels = collections.Counter(label for _, _, label in rows)
    assert labels[2] == 0
    assert labels[0] / labels[1] == pytest.approx(2, rel=0.1)
    assert rows == read(make_feed(index=index.uri, class_weights=weights, epochs=2))


def test_a_mix_of_other_classes_is_refused(tmp_path: Path) -> None:
    one = write_packed(tmp_path / "one", num_classes=3)
    other = write_packed(tmp_path / "other", num_classes=4)
    with pytest.raises(UserError, match=r"data\.mix: .*other has number of classes 4"):
        make_feed(mix=(MixPart(index=one.uri), MixPart(index=other.uri)))


def test_a_label_outside_the_classes_stops_with_its_shard(tmp_path: Path) -> None:
    write_packed(tmp_path, num_classes=3)
    packed = write_packed(tmp_path, num_classes=3, label_of=lambda i: 7 if i == 5 else i % 3)
    feed = make_feed(index=packed.uri)
    with pytest.raises(UserError, match=r"00000\.parquet#0 row 5 has the label 7 but .* 3 classes"):
        read(feed)
