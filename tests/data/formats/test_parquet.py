import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode_png
from sources import read_samples, write_parquet

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats import inplace
from orchestrator.data.formats.detect import detect, open_format
from orchestrator.data.formats.files import named_splits
from orchestrator.data.formats.inplace import choose_splits
from orchestrator.data.formats.parquet import open_parquet
from orchestrator.data.formats.request import Request
from orchestrator.data.packing.settings import PackSettings

N = 40
IMAGES = [encode_png(i) for i in range(N)]


def look(root, **request):
    """Return the format and the row of each file that says whether it may stay."""
    source = open_parquet(str(root), Request(**request))
    return source, source.survey(source.items(0)).files.to_pylist()


def test_image_bytes_are_read(tmp_path):
    write_parquet(f"{tmp_path}/a.parquet", {"image": IMAGES, "label": list(range(N))})
    source, (row,) = look(tmp_path)
    samples, bad = read_samples(source)
    assert bad == []
    assert [s.image for s in samples] == IMAGES
    assert [s.label for s in samples] == list(range(N))
    assert (samples[3].id, samples[3].uri) == ("a.parquet#3", f"{tmp_path}/a.parquet#3")
    assert row["why_not"] == ""
    assert row["chunk_rows"] == [16, 16, 8]
    assert row["path"] == f"{tmp_path}/a.parquet"
    assert row["bytes"] == storage.size(row["path"])
    assert row["etag"] == storage.etag(row["path"])


def test_the_struct_and_the_class_names_of_hugging_face(tmp_path):
    structs = [{"bytes": image, "path": "/etc/passwd"} for image in IMAGES]
    structs[1] = {"bytes": None, "path": "/etc/passwd"}
    columns = {"img": structs, "label": [i % 2 for i in range(N)]}
    write_parquet(f"{tmp_path}/a.parquet", columns, names=["=cat", "dog"])
    source, (row,) = look(tmp_path)
    assert source.columns == {"image": "img.bytes", "label": "label"}
    assert source.labels.classes == ("=cat", "dog")
    samples, bad = read_samples(source)
    assert [s.image for s in samples] == [IMAGES[0], *IMAGES[2:]]
    # The path of the struct is never opened.
    assert [b.reason for b in bad] == ["no_image: the row has no image bytes"]
    assert row["why_not"] == "it has rows without an image"


@pytest.mark.parametrize(
    ("labels", "kind", "first", "why_not"),
    [
        (["cat", "dog"] * 20, "class", 0, ""),
        ([[1, 2], [0]] * 20, "multi", (1, 2), ""),
        ([[], [0]] * 20, "multi", (), ""),
        ([0.5, 1.0] * 20, "float", 0.5, ""),
        (pa.array([3, 1] * 20, pa.int8()), "class", 3, ""),
        ([1, -1] * 20, "class", 1, "it has the label -1"),
        ([None, *[1] * 39], "class", 1, "1 rows have no label"),
        ([["cat"], ["dog"]] * 20, "multi", (0,), "not lists of class numbers"),
        (["cat", " cat"] * 20, "class", 0, "labels of nothing, or with spaces around"),
        (["1", "0"] * 20, "class", 1, "its labels are of type string"),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, kind, first, why_not):
    write_parquet(f"{tmp_path}/a.parquet", {"image": IMAGES, "label": labels})
    source, (row,) = look(tmp_path)
    assert source.labels.kind == kind
    names = tuple(sorted(source.survey(source.items(0)).names))
    source = source.with_labels(dataclasses.replace(source.labels, classes=names))
    assert read_samples(source)[0][0].label == first
    assert why_not in row["why_not"] if why_not else row["why_not"] == ""


@pytest.mark.parametrize(
    ("columns", "group", "why_not"),
    [
        ({}, 8, "have not between 16 and 2048 rows"),
        ({"image": [IMAGES[0]] * 2100}, 2100, "have not between 16 and 2048 rows"),
        ({"id": list(range(N))}, 16, ""),
        ({"key": [f"k{i}" for i in range(N)]}, 16, ""),
        ({"image": pa.array([], pa.binary())}, 16, "it has no rows"),
    ],
)
def test_files_in_bad_shape_are_copied(tmp_path, columns, group, why_not):
    columns = columns if "image" in columns else {"image": IMAGES, **columns}
    write_parquet(f"{tmp_path}/a.parquet", columns, group=group)
    _, (row,) = look(tmp_path)
    assert why_not in row["why_not"] if why_not else row["why_not"] == ""


def test_a_large_row_group_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(inplace, "MAX_GROUP_BYTES", 1000)
    write_parquet(f"{tmp_path}/a.parquet", {"image": IMAGES})
    assert "bytes, more than 1000" in look(tmp_path)[1][0]["why_not"]


def test_files_of_another_schema_and_damaged_ones_are_named(tmp_path):
    write_parquet(f"{tmp_path}/a.parquet", {"image": IMAGES, "label": [1] * N})
    write_parquet(f"{tmp_path}/b.parquet", {"image": IMAGES})
    with pytest.raises(UserError, match=r"b\.parquet has no column 'label', unlike the first"):
        look(tmp_path)
    storage.write_atomic(f"{tmp_path}/b.parquet", b"PAR1 but not really")
    with pytest.raises(UserError, match=r"b\.parquet is no Parquet file that can be read"):
        look(tmp_path)


def test_damage_inside_a_row_group_leaves_out_its_rows_and_no_others(tmp_path):
    location = f"{tmp_path}/a.parquet"
    noise = [encode_png(i, side=200) for i in range(N)]
    write_parquet(location, {"image": noise, "label": [1] * N})
    content = bytearray(storage.read_bytes(location))
    column = pq.read_metadata(location).row_group(1).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    content[at : at + 30] = b"\xff" * 30  # the header of a page
    storage.write_atomic(location, bytes(content))
    samples, bad = read_samples(look(tmp_path)[0])
    assert [s.id for s in samples] == [f"a.parquet#{i}" for i in (*range(16), *range(32, N))]
    assert [b.id for b in bad] == [f"a.parquet#{i}" for i in range(16, 32)]
    assert {b.reason.partition(":")[0] for b in bad} == {"parquet_damaged"}


def test_a_row_without_an_id_is_called_by_its_place(tmp_path):
    ids = [None, "", *(f"k{i}" for i in range(2, N))]
    write_parquet(f"{tmp_path}/a.parquet", {"image": IMAGES, "id": ids})
    found = [s.id for s in read_samples(look(tmp_path)[0])[0]]
    assert found == ["a.parquet#0", "a.parquet#1", *ids[2:]]


def test_the_columns_that_the_user_names(tmp_path):
    columns = {"a": IMAGES, "b": IMAGES, "y": [0.5] * N, "name": [f"n{i}" for i in range(N)]}
    write_parquet(f"{tmp_path}/a.parquet", columns)
    assert open_parquet(str(tmp_path), Request()) is None
    asked = {"image_column": "b", "label_column": "y", "id_column": "name"}
    source, _ = look(tmp_path, **asked)
    assert source.columns == {"image": "b", "label": "y", "id": "name"}
    assert read_samples(source)[0][5].id == "n5"
    with pytest.raises(UserError, match="--label-column z is no column of the source; it has a, b"):
        look(tmp_path, label_column="z", image_column="a")


@pytest.mark.parametrize(
    ("ids", "named", "expected"),
    [
        (["train-0.parquet", "validation-0.parquet", "x.parquet"], ("val",), ["train", "val", ""]),
        (["train/0.parquet", "dev/0.parquet", "test/0.parquet"], ("test", "val"), None),
        (["train-0.parquet", "trainer-1.parquet"], (), None),
    ],
)
def test_names_of_files_decide_their_split(ids, named, expected):
    assert named_splits(ids) == named
    splits = choose_splits(ids, PackSettings("s", val_fraction=0.0), named, {})
    if "val" in named:
        assert splits[1] == "val"
    assert splits[0] == "train"
    assert expected is None or splits[2] == "train"


def test_whole_files_are_divided_by_the_hash_of_their_path_and_stay():
    ids = [f"{i:05d}.parquet" for i in range(2000)]
    settings = PackSettings("s", val_fraction=0.1, test_fraction=0.1)
    splits = choose_splits(ids, settings, (), {})
    assert 150 < splits.count("val") < 250
    assert 150 < splits.count("test") < 250
    few = choose_splits(ids[:3], settings, (), {})
    assert sorted(few) == ["test", "train", "val"]
    known = dict(zip(ids[:3], few, strict=True))
    grown = choose_splits(ids, settings, (), known)
    assert grown[:3] == few
    assert grown[3:] == splits[3:]


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (["a/1.jpg", "a/meta.csv"], "imagefolder"),
        (["x.tar", "x.parquet", "x_stats.json"], "webdataset"),
        (["list.csv"], "manifest"),
        (["list.jsonl"], "manifest"),
    ],
)
def test_the_format_is_found_out_by_names(tmp_path, files, name):
    for file in files:
        storage.write_atomic(f"{tmp_path}/{file}", b"x")
    assert detect(str(tmp_path)) == name


def test_parquet_without_images_is_a_manifest(tmp_path):
    write_parquet(f"{tmp_path}/a.parquet", {"uri": ["x.png"] * 3, "label": [1, 2, 3]})
    name, source = open_format(str(tmp_path), Request(), print)
    assert name == "manifest"
    assert [row.uri for row in source.items(0)] == [f"{tmp_path}/x.png"] * 3
    with pytest.raises(UserError, match="has no column of image bytes"):
        open_format(str(tmp_path), Request(format="parquet"), print)
