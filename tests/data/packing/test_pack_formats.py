"""Every format through the whole of `pack`, on a cluster."""

import dataclasses
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import encode_png
from PIL import Image
from sources import webdataset_tar, write_parquet

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.chunk import read_chunk
from orchestrator.data.formats.request import Request
from orchestrator.data.index import read_chunks, read_shards
from orchestrator.data.packing.pack import pack
from orchestrator.data.packing.tally import read_quarantine

pytestmark = pytest.mark.slow
IMAGES = {f"{i:03d}": encode_png(i) for i in range(40)}


def ignore(line):
    """Say nothing."""


def read_rows(index):
    """Return (split, row) of every sample, read as training reads them."""
    for split in index.splits:
        chunks = read_chunks(index, split)
        for ref in chunks.locate(np.arange(chunks.sizes.num_chunks)):
            chunk = read_chunk(ref, index.columns)
            for row, image in enumerate(chunk.images):
                values = {name: column[row].as_py() for name, column in chunk.columns.items()}
                yield split, {"image": bytes(image), **values}


def images_of(index):
    return sorted(row["image"] for _, row in read_rows(index))


def test_tars_with_class_names_grow_by_a_tar(ray_with_s3):
    bucket = ray_with_s3.make_bucket("growing")
    names = {key: ("dog", "cat")[int(key) % 2] for key in IMAGES}
    storage.write_atomic(f"{bucket}/wds/b.tar", webdataset_tar(IMAGES, names))
    first = pack(f"{bucket}/wds", f"{bucket}/out", val_fraction=0.2, chunk_rows=8, say=ignore)
    assert first.classes == ("cat", "dog")
    before = {row["id"]: (split, row["label"], row["image"]) for split, row in read_rows(first)}
    assert {i: image for i, (_, _, image) in before.items()} == {
        f"b.tar/{key}": image for key, image in IMAGES.items()
    }
    assert sum(first.class_samples) == first.splits["train"].samples
    storage.write_atomic(
        f"{bucket}/wds/a.tar", webdataset_tar(IMAGES, dict.fromkeys(IMAGES, "ant"))
    )
    said = []
    grown = pack(f"{bucket}/wds", f"{bucket}/out", val_fraction=0.2, chunk_rows=8, say=said.append)
    # Known classes keep their numbers.
    assert grown.classes == ("cat", "dog", "ant")
    after = {row["id"]: (split, row["label"], row["image"]) for split, row in read_rows(grown)}
    assert len(after) == 80
    assert {name: after[name] for name in before} == before
    assert grown.digest != first.digest
    assert set(read_shards(first)) < set(read_shards(grown))
    storage.delete_file(f"{bucket}/wds/a.tar")
    storage.write_atomic(f"{bucket}/wds/b.tar", webdataset_tar(IMAGES, names) + b"\0" * 512)
    same = pack(f"{bucket}/wds", f"{bucket}/out", val_fraction=0.2, chunk_rows=8, say=said.append)
    assert same == grown
    assert "1 items are others now and 1 are gone" in said[-2]
    assert "nothing to do" in said[-1]


def test_a_grown_tree_keeps_shards_ids_splits_and_class_numbers(ray_with_s3, make_tree, tmp_path):
    root, _ = make_tree(cat=30, emu=30)
    out = str(tmp_path / "out")
    first = pack(root, out, val_fraction=0.2, say=ignore)
    before = {row["id"]: (split, row["label"], row["image"]) for split, row in read_rows(first)}
    for i in range(20):
        storage.write_atomic(f"{root}/ant/{i}.png", encode_png(500 + i))
        storage.write_atomic(f"{root}/cat/new{i}.png", encode_png(600 + i))
    grown = pack(root, out, val_fraction=0.2, say=ignore)
    assert grown.classes == ("cat", "emu", "ant")
    after = {row["id"]: (split, row["label"], row["image"]) for split, row in read_rows(grown)}
    assert len(after) == 100
    assert {name: after[name] for name in before} == before
    assert set(read_shards(first)) < set(read_shards(grown))
    assert list(grown.class_samples) == [
        sum(1 for split, label, _ in after.values() if (split, label) == ("train", n))
        for n in range(3)
    ]
    again = pack(root, out, val_fraction=0.2, say=ignore)
    assert again == grown


def test_good_parquet_is_indexed_where_it_lies_and_grows(ray_with_s3):
    bucket = ray_with_s3.make_bucket("inplace")
    keys = list(IMAGES.values())

    def write(number):
        structs = [{"bytes": image, "path": None} for image in keys]
        columns = {"image": structs, "label": [(number + i) % 3 for i in range(40)]}
        uri = f"{bucket}/hf/{number:05d}.parquet"
        write_parquet(uri, columns, names=["a", "b", "c"])

    for number in range(3):
        write(number)
    said = []
    index = pack(f"{bucket}/hf", f"{bucket}/out", say=said.append)
    assert "indexed 3 files in place, nothing was copied" in said[-1]
    assert images_of(index) == sorted(keys * 3)
    assert index.classes == ("a", "b", "c")
    assert index.columns == {"image": "image.bytes", "label": "label"}
    shards = read_shards(index)
    assert {shard.path for shard in shards} == {f"{bucket}/hf/0000{n}.parquet" for n in range(3)}
    assert all(shard.etag == storage.etag(shard.path) for shard in shards)
    assert sum(index.class_samples) == index.splits["train"].samples == 80
    assert [e.name for e in storage.list_tree(f"{bucket}/out")] == ["INDEX.json", index.table]
    write(3)
    grown = pack(f"{bucket}/hf", f"{bucket}/out", say=said.append)
    assert {(s.path, s.split) for s in shards} < {(s.path, s.split) for s in read_shards(grown)}
    write(3)
    assert pack(f"{bucket}/hf", f"{bucket}/out", say=said.append) == grown
    storage.delete_file(f"{bucket}/hf/00003.parquet")
    assert pack(f"{bucket}/hf", f"{bucket}/out", say=said.append).digest == index.digest
    assert "0 items are others now and 1 are gone" in said[-2]


def test_parquet_is_copied_where_it_is_asked_or_needed(ray_with_s3, tmp_path):
    columns = {"image": list(IMAGES.values()), "label": [[i % 4, 4] for i in range(40)]}
    for number in range(2):
        write_parquet(f"{tmp_path}/in/{number}.parquet", columns, group=8)
    said = []
    index = pack(f"{tmp_path}/in", f"{tmp_path}/needed", say=said.append)
    assert "copying the images, since they cannot be read where they lie" in said[0]
    assert "16 and 2048 rows" in said[0]
    assert index.label_kind == "multi"
    assert images_of(index) == sorted(list(IMAGES.values()) * 2)
    assert {tuple(row["label"]) for _, row in read_rows(index)} == {(n, 4) for n in range(4)}
    write_parquet(f"{tmp_path}/one/0.parquet", {"image": list(IMAGES.values())})
    index = pack(f"{tmp_path}/one", f"{tmp_path}/asked", copy=True, say=said.append)
    assert index.label_kind == "none"
    assert all(not shard.path.startswith("/") for shard in read_shards(index))
    assert "label" not in pq.read_schema(f"{tmp_path}/asked/{read_shards(index)[0].path}").names
    pack(f"{tmp_path}/one", f"{tmp_path}/few", say=said.append)
    assert "1 files are too few to give 'val' one of its own" in "\n".join(said)


def test_a_manifest_in_a_bucket_with_float_targets(ray_with_s3):
    bucket = ray_with_s3.make_bucket("floats")
    lines = ["uri,target,id"]
    for key, image in IMAGES.items():
        storage.write_atomic(f"{bucket}/set/{key}.png", image)
        lines.append(f"{bucket}/set/{key}.png,{int(key) / 2},{key}")
    storage.write_atomic(f"{bucket}/set/list.csv", "\n".join(lines).encode())
    index = pack(f"{bucket}/set/list.csv", f"{bucket}/out", val_fraction=0.2, say=ignore)
    assert (index.label_kind, index.classes) == ("float", ())
    assert {row["id"]: (row["label"], row["image"]) for _, row in read_rows(index)} == {
        key: (int(key) / 2, image) for key, image in IMAGES.items()
    }
    lines.append("http://169.254.169.254/x.png,1,x")
    storage.write_atomic(f"{bucket}/set/evil.csv", "\n".join(lines).encode())
    with pytest.raises(UserError, match=r"evil\.csv row 41 names 'http://169\.254"):
        pack(f"{bucket}/set/evil.csv", f"{bucket}/evil", say=ignore)
    assert not list(storage.list_tree(f"{bucket}/evil"))


def test_images_are_made_smaller(ray_with_s3, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        image = Image.fromarray(pixels).resize((600, 400))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=98)
        storage.write_atomic(f"{tmp_path}/in/cat/{i}.jpg", buffer.getvalue())
    said = []
    index = pack(f"{tmp_path}/in", f"{tmp_path}/out", max_side=300, say=said.append)
    sizes = {Image.open(io.BytesIO(row["image"])).size for _, row in read_rows(index)}
    assert sizes == {(300, 200)}
    assert any(line.startswith("encoding again made ") and "saved" in line for line in said)
    with pytest.raises(UserError, match="was packed with max_side 300, not 0"):
        pack(f"{tmp_path}/in", f"{tmp_path}/out", say=ignore)


def test_bad_samples_are_in_the_quarantine_with_their_first_bytes(ray_with_s3, tmp_path):
    images = {**IMAGES, "100": b"<html>404</html> and more", "101": b""}
    tar = webdataset_tar(images, dict.fromkeys(images, 1))
    storage.write_atomic(f"{tmp_path}/in/a.tar", tar)
    index = pack(f"{tmp_path}/in/a.tar", f"{tmp_path}/out", say=ignore)
    assert index.quarantined == 2
    html, empty = read_quarantine(index.uri).to_pylist()
    assert html.pop("reason").startswith("not_an_image: ")
    assert empty.pop("reason").startswith("empty: ")
    source = f"{tmp_path}/in/a.tar"
    assert html == {
        "uri": f"{source}#100",
        "id": "a.tar/100",
        "first_bytes": b"<html>404</html>".hex(),
        "epoch": 0,
    }
    assert empty == {"uri": f"{source}#101", "id": "a.tar/101", "first_bytes": "", "epoch": 0}
    assert index.classes == ("0", "1")


def test_what_was_found_out_stays_and_other_wishes_are_refused(ray_with_s3, tmp_path):
    tar = webdataset_tar(IMAGES, dict.fromkeys(IMAGES, 1))
    storage.write_atomic(f"{tmp_path}/in/a.tar", tar)
    out = f"{tmp_path}/out"
    first = pack(f"{tmp_path}/in", out, request=Request(label_kind="float"), say=ignore)
    assert first.label_kind == "float"
    assert pack(f"{tmp_path}/in", out, say=ignore) == first
    with pytest.raises(UserError, match=r"was packed with label_kind 'float', not 'class'"):
        pack(f"{tmp_path}/in", out, request=Request(label_kind="class"), say=ignore)
    assert dataclasses.asdict(first)["settings"]["format"] == "webdataset"
