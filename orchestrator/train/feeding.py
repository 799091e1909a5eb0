"""Worker side: a feed -> this worker's loader, read where the cluster has room."""

import ray
import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero

from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.index import Index
from orchestrator.data.loader import Loader, Opened, OpenSegment
from orchestrator.data.source import Placement, blocks_of, plan_segment, split_segment
from orchestrator.data.sources import read_data
from orchestrator.train.job import Job
from orchestrator.train.recovery import elastic


def place_readers(job: Job) -> Placement:
    """Decide where to read: now, when the workers hold their CPUs and a cluster has grown."""
    return Placement.choose(
        requested=job.config.data.decode_slots,
        cluster_cpus=_cluster_cpus(),
        worker_cpus=_held_cpus(job),
        may_grow=job.may_grow,
        share=job.share,
    )


def spare_cpus(job: Job) -> float:
    """Return the CPUs of the cluster that are left to this run's readers."""
    return max(0.0, (_cluster_cpus() - _held_cpus(job)) / job.share)


def _cluster_cpus() -> float:
    # Readers that count on the CPUs of a node that is about to go would wait for ever.
    return sum(node.get("CPU", 0) for node in elastic.usable_nodes().values())


def _held_cpus(job: Job) -> float:
    num_workers = ray.train.get_context().get_world_size()
    return job.config.reserved_cpus(num_workers) * job.share


def build_loader(
    feed: Feed, job: Job, index: Index, placement: Placement, *, rank: int, step: int
) -> Loader:
    """Return this worker's batches of a feed, from `step` on."""
    return Loader(
        feed.batching,
        rank=rank,
        step=step,
        open_segment=_segment_opener(feed, placement, rank),
        to_device=ToDevice(
            ray.train.torch.get_device(),
            job.config.data,
            label_kind=index.label_kind,
            num_classes=len(index.classes),
            seed=job.config.seed if feed.reader.render.augment else None,
        ),
        image_size=job.config.data.image_size,
        shares_cpus=placement.cpus == 0,
    )


def _segment_opener(feed: Feed, placement: Placement, rank: int) -> OpenSegment:
    def open_segment(step: int) -> Opened:
        opened = None
        if rank == 0:
            # Only here is the table of shards read: the others learn where the segment ends.
            segment = plan_segment(feed, placement, step)
            opened = split_segment(feed, placement, segment), segment
        iterators, segment = broadcast_from_rank_zero(opened)
        return Opened(blocks_of(iterators[rank]), segment.stop_step, segment.open_next_at)

    return open_segment


def validation_loader(job: Job, placement: Placement, rank: int, *, passes: int) -> Loader:
    """Return this worker's batches of so many passes over the validation split."""
    index = read_data(job.config.data)
    num_workers = ray.train.get_context().get_world_size()
    feed = feeds.evaluation_feed(
        job.config,
        index,
        split="val",
        passes=passes,
        num_workers=num_workers,
    )
    return build_loader(feed, job, index, placement, rank=rank, step=0)
