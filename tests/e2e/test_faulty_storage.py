"""Training data from an S3 server that refuses, cuts, stalls, flips, vanishes: nothing is lost."""

import collections
import threading
import time
from collections.abc import Iterator

import pytest
import ray
from faults import FaultProxy, Faults, serve_faults
from packed import write_packed
from s3 import S3Server, environment
from streaming import Workers

from orchestrator import cluster, storage
from orchestrator.config import Config, DataConfig, TrainConfig
from orchestrator.data import feeds
from orchestrator.data.feeds import Feed
from orchestrator.data.index import Index, read_index

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TRAIN = 5_000


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """Start a Ray cluster that reads through a fault proxy."""
    s3.make_bucket("faulty")
    with serve_faults(s3) as proxy, environment(proxy.env):
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield proxy
        ray.shutdown()


@pytest.fixture(scope="module")
def index(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("packed")
    write_packed(folder, train=TRAIN, val=8, chunk_rows=25, shard_rows=500)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.upload(path, f"s3://faulty/packed/{path.relative_to(folder)}")
    return read_index("s3://faulty/packed")


@pytest.fixture(autouse=True)
def healthy(proxy: FaultProxy) -> Iterator[None]:
    yield
    proxy.faults = Faults()


def make_feed(index: Index, *, workers: int = 2) -> Feed:
    data = DataConfig(
        index=index.uri, global_batch=100, max_micro_batch=50, image_size=8, window_chunks=8
    )
    config = Config(data=data, train=TrainConfig(max_epochs=1))
    return feeds.training_feed(config, index, num_workers=workers)


def expected() -> list[str]:
    return [f"train-{i:04d}" for i in range(TRAIN)]


def test_an_epoch_through_a_storm_of_faults_loses_and_doubles_nothing(
    proxy: FaultProxy, index: Index
) -> None:
    calm = Workers(make_feed(index))
    order = calm.consume(50)
    assert sorted(order) == expected()
    before = len(proxy.gets("train/"))
    proxy.faults = Faults(refuse=0.2, cut=0.1, stall=0.01, stall_s=40)
    stormy = Workers(make_feed(index))
    assert stormy.consume(50) == order
    proxy.faults = Faults()
    assert stormy.bad == []
    sent = len(proxy.gets("train/")) - before
    calm_requests, costs = calm.costs[0].requests, stormy.costs[0]
    assert calm.costs[0].retries == 0
    assert costs.retries > 0.1 * calm_requests
    assert costs.requests == sent <= 2 * calm_requests


def test_an_outage_is_waited_for(proxy: FaultProxy, index: Index) -> None:
    def vanish() -> None:
        proxy.faults = Faults(outage=True)
        time.sleep(15)
        proxy.faults = Faults()

    feed = make_feed(index)
    feed.source  # noqa: B018  (the table of shards is read before the outage)
    outage = threading.Thread(target=vanish)
    outage.start()
    time.sleep(0.5)
    workers = Workers(feed)
    assert sorted(workers.consume(50)) == expected()
    outage.join()
    assert workers.costs[0].retries > 0


@pytest.mark.parametrize(("fault", "reason"), [("missing", "missing"), ("denied", "denied")])
def test_a_shard_that_is_gone_or_denied_is_quarantined_and_its_neighbours_are_trained_on(
    proxy: FaultProxy, index: Index, fault: str, reason: str
) -> None:
    feed = make_feed(index)
    feed.source  # noqa: B018
    proxy.faults = Faults(**{fault: r"train/01500\.parquet"})
    workers = Workers(feed)
    ids = workers.consume(50)
    assert sorted(ids) == expected()[:1500] + expected()[2000:]
    assert len({entry["id"] for entry in workers.bad}) == len(workers.bad) == 500
    assert all(entry["reason"].startswith(f"{reason}: ") for entry in workers.bad)


def test_flipped_bytes_on_the_way_are_seen_and_fetched_again(
    proxy: FaultProxy, index: Index
) -> None:
    feed = make_feed(index)
    feed.source  # noqa: B018
    proxy.faults = Faults(flip=0.1)
    workers = Workers(feed)
    ids = workers.consume(50)
    counts = collections.Counter(ids) + collections.Counter(e["id"] for e in workers.bad)
    assert sum(counts.values()) == TRAIN
    # Twice in a row has odds of 1 in 100 for a chunk; without a second look 500 would be bad.
    assert len(workers.bad) < 300


def test_where_nothing_may_be_read_one_sentence_says_so(proxy: FaultProxy, index: Index) -> None:
    feed = make_feed(index)
    feed.source  # noqa: B018
    proxy.faults = Faults(denied=".")
    began = time.monotonic()
    with pytest.raises(Exception, match="LockedOutError") as caught:
        Workers(feed).consume(50)
    assert time.monotonic() - began < 30
    assert "credentials" in cluster.sentence(cluster.root_cause(caught.value))


def test_a_resume_near_the_end_reads_no_skipped_byte(proxy: FaultProxy, index: Index) -> None:
    feed = make_feed(index, workers=1)
    feed.source  # noqa: B018
    before = proxy.gets("train/")
    workers = Workers(feed, step=49)
    assert len(workers.consume(1)) == 100
    gets = proxy.gets("train/")[len(before) :]
    # The last 100 samples lie in the epoch's last windows: 8 chunks each, with a footer each.
    assert len(gets) <= 2 * 2 * 8
