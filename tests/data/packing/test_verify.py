import io

import pyarrow.parquet as pq
import pytest
from conftest import encode_png
from packed import write_packed
from PIL import Image
from sources import write_parquet

from orchestrator import storage
from orchestrator.cli import main
from orchestrator.data.formats.base import Bad
from orchestrator.data.index import read_index, read_shards
from orchestrator.data.packing.pack import pack
from orchestrator.data.packing.tally import (
    QUARANTINE_SCHEMA,
    BadTable,
    read_quarantine,
    write_quarantine,
)
from orchestrator.data.packing.verify import verify

pytestmark = pytest.mark.slow


def ignore(line):
    """Say nothing."""


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.frombytes("L", (64, 64), bytes(range(256)) * 16).save(buffer, "JPEG")
    return buffer.getvalue()[:-200]


def test_a_sound_data_set_is_sound(ray_cluster, tmp_path, capsys):
    write_packed(tmp_path)
    assert main(["pack", "--verify", "--out", str(tmp_path)]) == 0
    assert "50" in capsys.readouterr().out
    assert not (tmp_path / "quarantine.parquet").exists()


def test_what_is_bad_is_named_once_beside_what_packing_left_out(ray_cluster, tmp_path, capsys):
    broken = {"train-0003": truncated_jpeg(), "train-0007": b"<html>", "val-0001": b""}
    write_packed(tmp_path, broken=broken)
    packing = BadTable()
    packing.add([Bad.of("s3://elsewhere/x.png", "x.png", "missing: gone")])
    write_quarantine(str(tmp_path), packing.table())
    for _ in range(2):
        assert main(["pack", "--verify", "--out", str(tmp_path)]) == 1
        table = read_quarantine(str(tmp_path))
        assert table.schema.equals(QUARANTINE_SCHEMA)
        rows = {row["id"]: row for row in table.to_pylist()}
        assert len(rows) == table.num_rows == 4
        assert {name: row["reason"].partition(":")[0] for name, row in rows.items()} == {
            "x.png": "missing",
            "train-0003": "truncated",
            "train-0007": "not_an_image",
            "val-0001": "empty",
        }
        assert rows["train-0007"]["first_bytes"] == b"<html>".hex()
        assert rows["train-0003"]["uri"] == f"{tmp_path}/train/00000.parquet#0#3"
    out = capsys.readouterr().out
    assert "truncated" in out
    assert "not_an_image" in out


def test_changed_and_missing_shards_are_found(ray_cluster, tmp_path):
    index = write_packed(tmp_path, train=60)
    first, second, third = [s for s in read_shards(index) if s.split == "train"]
    content = bytearray((tmp_path / first.path).read_bytes())
    image = pq.read_table(tmp_path / first.path)["image"][5].as_py()
    content[content.index(image) + len(image) // 2] ^= 1
    (tmp_path / first.path).write_bytes(bytes(content))
    (tmp_path / second.path).unlink()
    (tmp_path / third.path).write_bytes(b"not Parquet")
    found = verify(str(tmp_path), say=ignore)
    assert found.samples == 70
    assert dict(found.reasons) == {"checksum": 1, "missing": 20, "changed": 20}


def test_parquet_in_place_is_checked_where_it_lies(ray_cluster, tmp_path):
    images = [encode_png(i) for i in range(40)]
    write_parquet(f"{tmp_path}/in/0.parquet", {"image": images, "label": [0, 1] * 20})
    write_parquet(
        f"{tmp_path}/in/1.parquet", {"image": [b"broken", *images[1:]], "label": [0, 1] * 20}
    )
    out = f"{tmp_path}/out"
    pack(f"{tmp_path}/in", out, val_fraction=0.5, say=ignore)
    assert read_index(out).settings["in_place"]
    for _ in range(2):
        assert dict(verify(out, say=ignore).reasons) == {"not_an_image": 1}
        (row,) = read_quarantine(out).to_pylist()
        assert row["uri"] == row["id"] == f"{tmp_path}/in/1.parquet#0#0"
    assert storage.size(f"{tmp_path}/in/1.parquet")


def test_a_source_below_the_packed_folder_stays_in_the_quarantine(ray_cluster, tmp_path):
    write_packed(tmp_path)
    left_out = BadTable()
    left_out.add([Bad.of(f"{tmp_path}/src/x.parquet#3", "x", "no_image: none")])
    write_quarantine(str(tmp_path), left_out.table())
    verify(str(tmp_path), say=ignore)
    assert [row["id"] for row in read_quarantine(str(tmp_path)).to_pylist()] == ["x"]
