"""`data.index` and `data.mix`: what a run reads, and mixes that do not fit together."""

import numpy as np
import pytest
from packed import write_packed

from orchestrator.config import DataConfig, MixPart, UserError
from orchestrator.data.index import Split, read_shards, write_index
from orchestrator.data.sources import open_source, read_data, verify_data


def mix_config(*uris, weights=None):
    weights = weights or [None] * len(uris)
    parts = tuple(MixPart(index=u, weight=w) for u, w in zip(uris, weights, strict=True))
    return DataConfig(mix=parts, window_chunks=2)


@pytest.fixture
def packed(tmp_path):
    return [
        write_packed(tmp_path / "a", train=40, val=10),
        write_packed(tmp_path / "b", train=12, val=0),
    ]


def test_one_index_is_read_as_it_is(packed):
    data = DataConfig(index=packed[0].uri)
    assert read_data(data) == packed[0]
    verify_data(data)
    source = open_source(data, "train", seed=0, shuffle=True)
    assert source.order.num_samples == 40
    assert source.order.digest == packed[0].digest
    assert source.locate(np.array([2]))[0].rows == 4


def test_a_mix_is_seen_as_one_index(packed):
    a, b = packed
    data = mix_config(a.uri, b.uri, weights=[1, 3])
    index = read_data(data)
    assert index.splits["train"] == Split(
        52, a.splits["train"].chunks + b.splits["train"].chunks, 3,
        a.splits["train"].bytes + b.splits["train"].bytes,
    )  # fmt: skip
    assert index.splits["val"] == a.splits["val"]
    assert index.classes == a.classes
    assert index.digest not in (a.digest, b.digest)
    assert open_source(data, "train", seed=0, shuffle=True).order.digest == index.digest
    verify_data(data)


def test_the_chunks_of_a_mix_lie_in_its_components(packed):
    a, b = packed
    source = open_source(mix_config(a.uri, b.uri, weights=[1, 3]), "train", seed=0, shuffle=True)
    window = source.order.window_at(0)
    refs = source.locate(window.chunk)
    of_a = [ref.uri.startswith(a.uri) for ref in refs]
    assert of_a == (window.chunk < a.splits["train"].chunks).tolist()
    assert int(window.rows[of_a].sum()) == window.stop // 4
    assert all(ref.rows >= n for ref, n in zip(refs, window.rows.tolist(), strict=True))


def test_a_mix_is_evaluated_one_component_after_the_other(packed):
    a, b = packed
    for split, samples in (("val", 10), ("train", 52)):
        source = open_source(mix_config(a.uri, b.uri), split, seed=0, shuffle=False)
        assert source.order.num_samples == samples
    window = source.order.window_at(40)
    assert window.start == 40
    assert source.locate(window.chunk[:1])[0].uri.startswith(b.uri)
    with pytest.raises(UserError, match=r"no index of data\.mix has a split 'test'"):
        open_source(mix_config(a.uri, b.uri), "test", seed=0, shuffle=False)


def test_class_counts_of_a_mix_are_what_its_epoch_holds(tmp_path, packed):
    uris = []
    for name, counts in (("c", [10, 10, 20]), ("d", [6, 6, 0])):
        part = packed["cd".index(name)]
        shards = read_shards(part)
        uris.append(str(tmp_path / name))
        write_index(
            uris[-1], classes=part.classes, shards=shards, settings={}, quarantined=0,
            class_samples=counts,
        )  # fmt: skip
    assert read_data(mix_config(*uris)).class_samples == (16, 16, 20)
    # Half of 52 from each: 26 / 40 of the first, 26 / 12 of the second.
    assert read_data(mix_config(*uris, weights=[1, 1])).class_samples == (20, 20, 13)
    assert read_data(mix_config(uris[0], packed[1].uri)).class_samples == ()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, None], "some indexes have a weight and some have none"),
        ([1, 0], "weight must be a number above 0, but it is 0"),
        ([1, float("inf")], "weight must be a number above 0, but it is inf"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(packed, weights, message):
    with pytest.raises(UserError, match=message):
        read_data(mix_config(packed[0].uri, packed[1].uri, weights=weights))


def test_components_that_differ_are_refused(tmp_path, packed):
    first, shards = packed[0], read_shards(packed[0])
    names = list(first.classes)
    for i, (options, message) in enumerate(
        [
            ({"classes": [*names[:2], "emu"]}, r"label 2 is 'emu' in .*/0 but 'class-2' in .*/a"),
            ({"classes": names[:2]}, "has number of classes 2 but"),
            ({"label_kind": "multi"}, "has labels 'multi' but .* has 'class'"),
            ({"columns": {"image": "jpg"}}, "has columns {'image': 'jpg'} but"),
        ]
    ):
        uri = str(tmp_path / str(i))
        write_index(uri, **{"classes": names, **options}, shards=shards, settings={}, quarantined=0)
        with pytest.raises(UserError, match=message):
            read_data(mix_config(first.uri, uri))


def test_an_index_and_a_mix_are_one_too_many(packed):
    data = DataConfig(index=packed[0].uri, mix=(MixPart(index=packed[1].uri),))
    with pytest.raises(UserError, match=r"data\.index=.* and data\.mix are both set"):
        read_data(data)


def test_a_component_without_training_images_is_refused(tmp_path, packed):
    only_val = write_packed(tmp_path / "v", train=0, val=5)
    with pytest.raises(UserError, match="/v has no train images, so it cannot have a share"):
        read_data(mix_config(packed[0].uri, only_val.uri))
