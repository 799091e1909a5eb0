import dataclasses
import gzip
import json

import pytest
from conftest import encode_png
from sources import read_samples, tar_bytes, webdataset_tar

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.request import Request
from orchestrator.data.formats.webdataset import open_tars, split_name


def write(root, **tars):
    for name, content in tars.items():
        storage.write_atomic(f"{root}/{name}.tar", content)
    return str(root)


def opened(root, **request):
    source = open_tars(str(root), Request(**request))
    if source.needs_survey:
        names = source.survey(source.items(0)).names
        labels = dataclasses.replace(source.labels, classes=tuple(sorted(names)))
        source = source.with_labels(labels)
    return source


IMAGES = {f"{i:03d}": encode_png(i) for i in range(6)}


def test_class_numbers_in_cls(tmp_path):
    labels = {key: int(key) % 3 for key in IMAGES}
    root = write(tmp_path, a=webdataset_tar(IMAGES, labels))
    samples, bad = read_samples(opened(root))
    assert bad == []
    assert {s.id: s.image for s in samples} == {f"a.tar/{k}": v for k, v in IMAGES.items()}
    assert [s.label for s in samples] == [labels[k] for k in IMAGES]
    assert samples[0].uri == f"{root}/a.tar#000"


def test_class_names_get_numbers_in_the_order_of_the_alphabet(tmp_path):
    names = {key: ("dog", "cat", "=1+1\u00e9")[int(key) % 3] for key in IMAGES}
    source = opened(write(tmp_path, a=webdataset_tar(IMAGES, names)))
    assert source.labels.classes == ("=1+1\u00e9", "cat", "dog")
    samples, _ = read_samples(source)
    assert [source.labels.classes[s.label] for s in samples] == list(names.values())


@pytest.mark.parametrize(
    ("raw", "kind", "label"),
    [(3, "class", 3), (0.5, "float", 0.5), ([2, 1], "multi", (1, 2))],
)
def test_labels_in_json(tmp_path, raw, kind, label):
    members = [("x.jpg", encode_png(1)), ("x.json", json.dumps({"label": raw}).encode())]
    source = opened(write(tmp_path, a=tar_bytes(members)))
    assert (source.labels.kind, source.labels.column) == (kind, "json:label")
    assert read_samples(source)[0][0].label == label


def test_img2dataset_has_captions_and_tables_and_no_labels(tmp_path):
    members = []
    for i in range(3):
        key = f"{i:09d}"
        meta = json.dumps({"caption": "a cat", "key": key, "sha256": "x"}).encode()
        members += [(f"{key}.jpg", encode_png(i)), (f"{key}.json", meta), (f"{key}.txt", b"a cat")]
    root = write(tmp_path, **{"00000": tar_bytes(members)})
    storage.write_atomic(f"{root}/00000.parquet", b"a table of captions")
    storage.write_atomic(f"{root}/00000_stats.json", b"{}")
    source = opened(root)
    assert source.labels.kind == "none"
    samples, bad = read_samples(source)
    assert [s.label for s in samples] == [None] * 3
    assert bad == []
    captions = opened(root, label_column="txt", label_kind="class")
    assert captions.labels.classes == ("a cat",)


def test_what_cannot_be_a_sample_is_named_and_the_rest_is_read(tmp_path):
    members = [
        ("good.png", encode_png(1)),
        ("good.cls", b"1"),
        ("nolabel.png", encode_png(2)),
        ("badlabel.png", encode_png(2)),
        ("badlabel.cls", b"one"),
        ("noimage.cls", b"1"),
        ("../up.png", encode_png(3)),
        ("../up.cls", b"2"),
        ("._good.png", b"resource fork"),
        ("good.png", encode_png(4)),
        ("good.cls", b"1"),
    ]
    samples, bad = read_samples(opened(write(tmp_path, a=tar_bytes(members)), label_kind="float"))
    assert [s.id for s in samples] == ["a.tar/good", "a.tar/../up"]
    assert [(b.id, b.reason.partition(":")[0]) for b in bad] == [
        ("a.tar/nolabel", "no_label"),
        ("a.tar/badlabel", "bad_label"),
        ("a.tar/noimage", "no_image"),
        ("a.tar/good", "duplicate"),
    ]
    assert bad[0].first_bytes == encode_png(2)[:16].hex()


def test_the_samples_before_damage_are_kept_and_the_tar_is_named(tmp_path):
    labels = dict.fromkeys(IMAGES, 1)
    whole = webdataset_tar(IMAGES, labels)
    cut = whole[: whole.index(IMAGES["004"]) + 10]
    root = write(tmp_path, a=cut, b=whole)
    samples, bad = read_samples(opened(root))
    assert [s.id for s in samples] == [f"a.tar/{i:03d}" for i in range(4)] + [
        f"b.tar/{i:03d}" for i in range(6)
    ]
    assert [(b.uri, b.reason.partition(":")[0]) for b in bad] == [
        (f"{root}/a.tar", "tar_truncated")
    ]


def test_a_compressed_tar_is_refused_and_never_inflated(tmp_path):
    bomb = gzip.compress(b"\0" * (64 << 20))
    storage.write_atomic(f"{tmp_path}/x/a.tar.gz", bomb)
    with pytest.raises(UserError, match=r"a\.tar\.gz is a compressed tar.*decompress it"):
        open_tars(f"{tmp_path}/x", Request())
    storage.write_atomic(f"{tmp_path}/y/a.tar", bomb)
    with pytest.raises(UserError, match=r"a\.tar holds no sample \(tar_damaged.*compressed"):
        open_tars(f"{tmp_path}/y", Request())


def test_one_tar_is_a_source_and_its_splits_may_be_named(tmp_path):
    tar = webdataset_tar(IMAGES, dict.fromkeys(IMAGES, 0))
    root = write(tmp_path, **{"train-0": tar, "val-0": tar})
    assert {s.id for s in read_samples(opened(f"{root}/val-0.tar"))[0]} == {
        f"val-0.tar/{key}" for key in IMAGES
    }
    source = opened(root)
    assert source.named_splits == ("val",)
    assert {s.split for s in read_samples(source)[0] if s.id.startswith("val")} == {"val"}
    assert {s.split for s in read_samples(source)[0] if s.id.startswith("train")} == {""}


def test_the_users_list_of_classes_is_the_law(tmp_path):
    root = write(tmp_path, a=webdataset_tar(IMAGES, dict.fromkeys(IMAGES, "emu")))
    source = open_tars(root, Request(label_kind="class", classes=("cat", "emu")))
    assert not source.needs_survey
    assert read_samples(source)[0][0].label == 1
    source = open_tars(root, Request(label_kind="class", classes=("cat", "dog")))
    with pytest.raises(UserError, match=r"a\.tar#000: label 'emu' is none of the 2 known classes"):
        read_samples(source)
    root = write(tmp_path, a=webdataset_tar(IMAGES, dict.fromkeys(IMAGES, 5)))
    source = open_tars(root, Request(classes=("cat", "dog")))
    with pytest.raises(UserError, match="label 5 is outside the 2 classes"):
        read_samples(source)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x.y/a.b.JPG", ("x.y/a", "b.jpg")),
        (".hidden", ("", "")),
        ("x/._a.jpg", ("", "")),
        ("noextension", ("noextension", "")),
    ],
)
def test_key_and_extension(name, parts):
    assert split_name(name) == parts


@pytest.mark.slow
def test_tars_are_read_from_s3(s3):
    root = f"{s3.make_bucket('tars')}/wds"
    images = {f"{i:03d}": encode_png(i, side=64) for i in range(40)}
    big = tar_bytes([("000.depth", b"\1" * (9 << 20))])
    storage.write_atomic(f"{root}/a.tar", big + webdataset_tar(images, dict.fromkeys(images, 2)))
    samples, bad = read_samples(opened(root))
    assert {s.id: s.image for s in samples} == {f"a.tar/{k}": v for k, v in images.items()}
    assert bad == []
