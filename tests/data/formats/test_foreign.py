import json
import sys
import types

import pytest
from conftest import encode_png
from sources import read_samples

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.detect import detect, open_format
from orchestrator.data.formats.foreign import Rows, list_shards, open_foreign
from orchestrator.data.formats.request import Request

MDS = {
    "version": 2,
    "shards": [
        {"format": "mds", "samples": 3, "raw_data": {"basename": "shard.00000.mds", "bytes": 100}},
        {"format": "mds", "samples": 2, "raw_data": {"basename": "shard.00001.mds", "bytes": 80}},
    ],
}
LITDATA = {"chunks": [{"chunk_size": 3, "chunk_bytes": 100, "filename": "chunk-0-0.bin"}]}


@pytest.mark.parametrize(
    ("name", "index", "module", "shards"),
    [
        (
            "mds",
            MDS,
            "streaming",
            [Rows("shard.00000.mds", 100, 0, 3), Rows("shard.00001.mds", 80, 3, 5)],
        ),
        ("litdata", LITDATA, "litdata", [Rows("chunk-0-0.bin", 100, 0, 3)]),
    ],
)
def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch, name, index, module, shards):
    storage.write_atomic(f"{tmp_path}/index.json", json.dumps(index).encode())
    assert detect(str(tmp_path)) == name
    assert list(list_shards(name, str(tmp_path))) == shards
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package .*pip install 'orchestrator\[{name}"):
        open_format(str(tmp_path), Request(), print)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"shards": [{"format": "mds"}]}', "is damaged"),
        (b'{"chunks": []}', "without samples"),
        (b"{", "is no JSON"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content, message):
    storage.write_atomic(f"{tmp_path}/index.json", content)
    with pytest.raises(UserError, match=message):
        open_format(str(tmp_path), Request(), print)


def test_a_damaged_sample_is_one_bad_sample_and_ids_name_shard_and_row(tmp_path, monkeypatch):
    class LocalDataset:
        def __init__(self, local):
            self.local = local

        def __getitem__(self, number):
            if number == 3:
                raise KeyError("no such column")
            return {"image": encode_png(number), "label": number}

    monkeypatch.setitem(sys.modules, "streaming", types.SimpleNamespace(LocalDataset=LocalDataset))
    storage.write_atomic(f"{tmp_path}/index.json", json.dumps(MDS).encode())
    source = open_foreign("mds", str(tmp_path), Request())
    samples, (bad,) = read_samples(source)
    assert [s.id for s in samples] == [
        *(f"shard.00000.mds#{row}" for row in range(3)),
        "shard.00001.mds#1",
    ]
    assert [s.label for s in samples] == [0, 1, 2, 4]
    assert (bad.id, bad.reason.partition(":")[0]) == ("shard.00001.mds#0", "damaged")
    # A shard before it changes neither ids nor stamps.
    assert Rows("x", 9, 0, 3).stamp == Rows("x", 9, 4, 7).stamp


@pytest.mark.parametrize("basename", ["../x.mds", "/etc/x.mds", "a/../../x.mds", ""])
def test_a_shard_outside_the_source_is_refused(tmp_path, basename):
    shard = {"format": "mds", "samples": 3, "raw_data": {"basename": basename, "bytes": 100}}
    storage.write_atomic(f"{tmp_path}/index.json", json.dumps({"shards": [shard]}).encode())
    with pytest.raises(UserError, match="is no name of a shard"):
        list(list_shards("mds", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("mds", {"shards": [{**MDS["shards"][0], "column_encodings": ["jpeg", "pkl"]}]}),
        ("litdata", {**LITDATA, "config": {"data_format": ["jpeg", "pickle"]}}),
    ],
)
def test_pickles_are_refused(tmp_path, name, index):
    storage.write_atomic(f"{tmp_path}/index.json", json.dumps(index).encode())
    with pytest.raises(UserError, match="column of Python pickles, which can run any code"):
        list(list_shards(name, str(tmp_path)))
