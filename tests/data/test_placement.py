"""Where read tasks run: beside no worker where CPU-only nodes exist, and again where one died."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from packed import write_packed
from ray import cloudpickle
from ray.cluster_utils import Cluster

from orchestrator.config import Config, DataConfig, TrainConfig
from orchestrator.data import feeds
from orchestrator.data.fetch import Work
from orchestrator.data.render import Reader
from orchestrator.data.source import Placement, blocks_of, plan_segment, split_segment

pytestmark = pytest.mark.slow
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Telling:
    """A reader that leaves a file named after its node for each task."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self._reader = reader
        self._folder = folder
        self.render = reader.render

    def blocks(self, work: Work) -> Iterator[pa.Table]:
        """Yield what the reader does."""
        node = ray.get_runtime_context().get_node_id()
        (self._folder / f"{node}-{work.task.start}").touch()
        return self._reader.blocks(work)


@pytest.fixture
def nodes() -> Iterator[dict[str, Any]]:
    """Start a head without CPUs, a node that claims a GPU, and one without.

    Each has room for twice the readers that run at once: where a task has just ended, the node that
    places the next one still counts its CPU as taken for up to 0.1 s (Ray's resource reports), and
    a node that looks full is passed over.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    added = {
        "gpu": cluster.add_node(num_cpus=4, num_gpus=1),
        "cpu": cluster.add_node(num_cpus=4),
    }
    ray.init(address=cluster.address, log_to_driver=False)
    yield {name: node.node_id for name, node in added.items()}
    ray.shutdown()
    cluster.shutdown()


def test_nodes_without_gpus_decode_first(nodes: dict[str, Any], tmp_path: Path) -> None:
    index = write_packed(tmp_path / "data", train=600, val=4)
    data = DataConfig(index=index.uri, global_batch=50, image_size=8, window_chunks=4)
    config = Config(data=data, train=TrainConfig(max_epochs=8))
    feed = feeds.training_feed(config, index, num_workers=1)
    told = tmp_path / "told"
    told.mkdir()
    object.__setattr__(feed, "reader", Telling(feed.reader, told))
    placement = Placement.choose(requested=2, cluster_cpus=8, worker_cpus=4)
    segment = plan_segment(feed, placement, 0)
    (iterator,) = split_segment(feed, placement, segment)
    positions = [p for block in blocks_of(iterator) for p in block["positions"][0].as_py()]
    assert positions == list(range(4800))
    ran_on = {path.name.split("-")[0] for path in told.iterdir()}
    assert ran_on == {nodes["cpu"]}
