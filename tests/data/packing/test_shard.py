import dataclasses
import io
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import encode_png
from PIL import Image

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats import base
from orchestrator.data.formats.base import File, Unit
from orchestrator.data.formats.imagefolder import ImageFolder
from orchestrator.data.formats.labels import Labels
from orchestrator.data.index import SHARD_SCHEMA
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.shard import UnitResult
from orchestrator.data.packing.shard import pack_unit as pack_unit_of


def settings(source="src", **changes):
    usual = {"chunk_rows": 8, "unit_images": 100, "val_fraction": 0.2, "test_fraction": 0.1}
    return PackSettings(source=source, **{**usual, **changes})


def pack_unit(unit, out, settings):
    """Pack files of a tree whose classes are called by one digit."""
    tree = ImageFolder(settings.source, Labels("class", named=True, classes=tuple("012")))
    return pack_unit_of(unit, out, settings, tree)


def unit_of(root, files):
    listed = [File(name, len(content), int(name[0])) for name, content in files.items()]
    for name, content in files.items():
        storage.write_atomic(storage.join(root, name), content)
    return Unit("00000/0000-000000", tuple(listed))


def modified(folder):
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*.*")}


@pytest.fixture
def packed(tmp_path):
    source, out = str(tmp_path / "src"), str(tmp_path / "out")
    files = {f"{i % 3}/{i:03d}.png": encode_png(i, side=4 + i % 3) for i in range(60)}
    unit = unit_of(source, files)
    return unit, files, out, settings(source), pack_unit(unit, out, settings(source))


def test_every_image_is_in_exactly_one_shard_with_its_bytes(packed):
    _, files, out, _, result = packed
    rows = [r for s in result.shards for r in pq.read_table(f"{out}/{s.path}").to_pylist()]
    assert {row["id"]: row["image"] for row in rows} == files
    assert len(rows) == len(files) == result.images
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        assert (row["width"], row["height"]) == image.size
        assert row["checksum"] == xxhash.xxh3_64_intdigest(row["image"])
        assert row["label"] == int(row["id"][0])
    assert result.images_of_label == {0: 20, 1: 20, 2: 20}


def test_shards_have_the_schema_and_row_groups_of_the_chosen_size(packed):
    _, _, out, chosen, result = packed
    for shard in result.shards:
        file = pq.ParquetFile(f"{out}/{shard.path}")
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert tuple(groups) == shard.chunk_rows
        assert set(groups[:-1]) <= {chosen.chunk_rows}
        assert file.schema_arrow.equals(SHARD_SCHEMA)
        assert os.path.getsize(f"{out}/{shard.path}") == shard.bytes
        table = file.read(columns=["id", "label", "checksum"])
        checksums = table["checksum"].to_pylist()
        named = zip(table["id"].to_pylist(), table["label"].to_pylist(), checksums, strict=True)
        content = b"".join(
            c.to_bytes(8, "little") + json.dumps([i, label]).encode() for i, label, c in named
        )
        assert xxhash.xxh3_64_intdigest(content) == shard.content


def test_a_finished_unit_is_not_done_again(packed):
    unit, _, out, chosen, result = packed
    before = modified(out)
    assert pack_unit(unit, out, chosen) == result
    assert modified(out) == before


def test_a_changed_unit_is_done_again(packed):
    _, files, out, chosen, result = packed
    grown = unit_of(chosen.source, {**files, "0/new.png": encode_png(999)})
    assert pack_unit(grown, out, chosen).images == result.images + 1


def test_a_unit_whose_shard_is_gone_or_whose_marker_is_damaged_is_done_again(packed):
    unit, _, out, chosen, result = packed
    os.unlink(f"{out}/{result.shards[0].path}")
    assert pack_unit(unit, out, chosen) == result
    assert os.path.exists(f"{out}/{result.shards[0].path}")
    Path(out, "units", f"{unit.name}.json").write_text("{")
    assert pack_unit(unit, out, chosen) == result


def test_a_unit_of_a_source_that_is_read_otherwise_is_done_again(packed):
    unit, _, out, chosen, result = packed
    tree = ImageFolder(chosen.source, Labels("class", named=True, classes=tuple("012")))
    other = pack_unit_of(unit, out, chosen, dataclasses.replace(tree, named_splits=("val",)))
    assert other.digest != result.digest
    assert "val" not in {shard.split for shard in other.shards}


def test_a_stale_marker_is_gone_before_its_shards_are_written_again(packed):
    unit, _, out, chosen, _ = packed
    tree = ImageFolder(chosen.source, Labels("class", named=True, classes=tuple("01x")))
    in_the_way = Path(out, "train", unit.name.replace("/", "-") + ".parquet")
    in_the_way.unlink()
    in_the_way.mkdir()
    with pytest.raises(UserError):
        pack_unit_of(unit, out, chosen, tree)
    assert not Path(out, "units", f"{unit.name}.json").exists()


def test_bad_samples_are_named_up_to_a_number_and_then_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.data.packing.shard.MAX_NAMED_BAD", 3)
    source, out = str(tmp_path / "src"), str(tmp_path / "out")
    unit = unit_of(source, {f"0/{i}.txt": b"hello" for i in range(10)})
    bad = pack_unit(unit, out, settings(source)).bad
    assert len(bad) == 4
    assert bad[-1].reason == "not_an_image: and 7 more in this unit"


def test_a_second_sample_of_an_id_is_a_duplicate(tmp_path):
    source, out = str(tmp_path / "src"), str(tmp_path / "out")
    unit = unit_of(source, {"0/a.png": encode_png(1)})
    result = pack_unit(Unit(unit.name, unit.items * 2), out, settings(source))
    assert result.images == 1
    assert [b.reason.partition(":")[0] for b in result.bad] == ["duplicate"]


def test_a_marker_survives_json(packed):
    result = packed[-1]
    assert UnitResult.from_json(result.to_json()) == result


def test_files_that_are_no_images_are_left_out_with_their_reason(tmp_path, monkeypatch):
    source, out = str(tmp_path / "src"), str(tmp_path / "out")
    bad = {
        "0/empty.png": (b"", "empty"),
        "0/notes.txt": (b"hello", "not_an_image"),
        "0/bomb.ppm": (b"P6 60000 60000 255 ", "too_many_pixels"),
        "0/large.png": (encode_png(1, side=64), "too_large"),
        "0/gone.png": (b"x", "missing"),
        os.fsdecode(b"0/\xff.png"): (encode_png(2), "bad_name"),
    }
    unit = unit_of(source, {"0/good.png": encode_png(3), **{n: c for n, (c, _) in bad.items()}})
    os.unlink(f"{source}/0/gone.png")
    monkeypatch.setattr(base, "UNIT_BYTES", 2000)
    result = pack_unit(unit, out, settings(source, val_fraction=0.0, test_fraction=0.0))
    assert result.images == 1
    expected = {name.replace("\udcff", "\\xff"): reason for name, (_, reason) in bad.items()}
    assert {entry.id: entry.reason.partition(":")[0] for entry in result.bad} == expected
    assert all(entry.uri == f"{source}/{entry.id}" for entry in result.bad)


def test_a_split_depends_on_nothing_but_the_id():
    ids = [f"cat/{i}.png" for i in range(20_000)]
    chosen = settings()
    splits = {i: chosen.split_of(i) for i in ids}
    assert {i: chosen.split_of(i) for i in reversed(ids)} == splits
    counts = {name: list(splits.values()).count(name) for name in ("train", "val", "test")}
    for name, share in chosen.fractions().items():
        assert counts[name] / len(ids) == pytest.approx(share, abs=0.01)
    # A larger share only adds: what was validated on is never trained on.
    grown = settings(val_fraction=0.25, test_fraction=0.0)
    assert all(grown.split_of(i) == "val" for i in ids if splits[i] == "val")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"chunk_rows": 0}, "--chunk-rows"),
        ({"unit_images": -1}, "--unit-images"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"test_fraction": -0.1}, "--test-fraction"),
        ({"quality": 101}, "--quality must be 1 to 100"),
        ({"max_side": -1}, "--max-side"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "--val-fraction 0.5 and --test-fraction 0.5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, flag):
    with pytest.raises(UserError, match=flag):
        settings(**changes).check()
