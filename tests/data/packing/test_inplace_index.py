import pytest
from conftest import encode_png
from sources import write_parquet

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.parquet import open_parquet
from orchestrator.data.formats.request import Request
from orchestrator.data.index import read_shards
from orchestrator.data.packing import inplace_index
from orchestrator.data.packing.growth import Before
from orchestrator.data.packing.job import Job
from orchestrator.data.packing.settings import PackSettings


def test_a_split_that_lost_its_last_file_is_refused(tmp_path):
    source, out, said = f"{tmp_path}/in", f"{tmp_path}/out", []
    for number in range(3):
        images = [encode_png(100 * number + i) for i in range(32)]
        write_parquet(f"{source}/{number}.parquet", {"image": images})
    tree = open_parquet(source, Request())
    job = Job(tree, out, 0, PackSettings(source))
    survey = tree.survey(tree.items(0))
    assert inplace_index.decide(job, survey, None, said.append)
    record = {**job.settings.content(), "in_place": True}
    index = inplace_index.write(job, tree, survey, None, record, said.append)
    before = Before(index, Request(), 0)
    assert inplace_index.decide(job, survey, before, said.append)
    (val,) = [shard.path for shard in read_shards(index) if shard.split == "val"]
    storage.delete_file(val)
    with pytest.raises(UserError, match="in place, but 2 files are too few to give 'val'"):
        inplace_index.decide(job, tree.survey(tree.items(0)), before, said.append)
