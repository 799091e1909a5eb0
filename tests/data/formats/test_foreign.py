import json
import sys

import pytest

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.detect import detect, open_format
from orchestrator.data.formats.foreign import Rows, list_shards
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
