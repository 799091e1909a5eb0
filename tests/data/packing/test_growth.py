import pytest

from orchestrator.config import UserError
from orchestrator.data.formats.request import Request
from orchestrator.data.index import Shard, write_index
from orchestrator.data.packing.growth import read_before, say_changes
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.units import Listed


def test_what_was_found_out_may_be_said_when_packing_again(tmp_path):
    settings = PackSettings("src")
    request = {"format": "", "label_kind": None, "label_column": "", "image_column": ""}
    record = {
        **settings.content(),
        "format": "parquet",
        "request": {**request, "id_column": "", "classes": [], "allow": []},
        "labels": {"kind": "class", "column": "label", "named": False},
        "generation": 0,
    }
    shards = [Shard("train", "train/0.parquet", 8, 100, 1, (8,))]
    write_index(str(tmp_path), classes=("a",), shards=shards, settings=record, quarantined=0)
    said = Request(format="parquet", label_kind="class", label_column="label")
    assert read_before(str(tmp_path), settings, said).request.label_column == ""
    with pytest.raises(UserError, match="packed with label_kind 'class', not 'float'"):
        read_before(str(tmp_path), settings, Request(label_kind="float"))


def test_what_becomes_of_changed_items_depends_on_where_they_lie():
    lines = []
    say_changes(Listed(3, 1, 2), lines.append)
    say_changes(Listed(3, 1, 2), lines.append, in_place=True)
    assert "what was packed of them stays" in lines[0]
    assert "the index names the files as they are now" in lines[1]
