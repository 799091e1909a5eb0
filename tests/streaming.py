"""A run's workers as threads: the stream through Ray Data without a training run around it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from orchestrator.data.assemble import Costs
from orchestrator.data.batch import MicroBatch
from orchestrator.data.device import ToDevice
from orchestrator.data.feeds import Feed
from orchestrator.data.loader import Loader, Opened
from orchestrator.data.source import Placement, Segment, blocks_of, plan_segment, split_segment

SHARING = Placement(slots=2, cpus=0, reason="")


class Workers:
    """Consume a feed; segments are opened once, by whichever worker comes first."""

    def __init__(self, feed: Feed, *, step: int = 0) -> None:
        self._feed = feed
        self._step = step
        self._lock = threading.Lock()
        self.opened: dict[int, tuple[list[Any], Segment]] = {}
        self.bad: list[dict[str, Any]] = []
        self.costs: list[Costs] = []
        """Of each worker; those of rank 0 hold the whole run's."""

    def consume(self, steps: int, *, pause: Callable[[int], float] = lambda rank: 0.0) -> list[str]:
        """Return the ids of `steps` steps in stream order; the bad ones are in `bad`."""
        num = self._feed.batching.num_workers
        with ThreadPoolExecutor(num) as pool:
            parts = list(pool.map(lambda rank: self._worker(rank, steps, pause(rank)), range(num)))
        batches = [batch for part in parts for batch in part]
        by_position = {
            position: name
            for batch in batches
            for position, name in zip(batch.positions, batch.ids, strict=True)
        }
        assert len(by_position) == sum(len(batch.ids) for batch in batches)
        self.bad = [entry for batch in batches for entry in batch.bad]
        places = sorted([*by_position, *(entry["position"] for entry in self.bad)])
        assert places == list(range(places[0], places[-1] + 1))
        return [by_position[position] for position in sorted(by_position)]

    def _worker(self, rank: int, steps: int, pause: float) -> list[MicroBatch]:
        loader = Loader(
            self._feed.batching,
            rank=rank,
            step=self._step,
            open_segment=lambda step: self._open(step, rank),
            to_device=ToDevice(torch.device("cpu"), self._feed.reader.render.data),
            image_size=self._feed.reader.render.data.image_size,
        )
        found: list[MicroBatch] = []
        for _ in loader.take(steps):
            assert loader.current is not None
            found.append(loader.current.batch)
            time.sleep(pause)
        loader.close()
        if rank == 0:
            self.costs.insert(0, loader.costs)
        else:
            self.costs.append(loader.costs)
        return found

    def _open(self, step: int, rank: int) -> Opened:
        with self._lock:
            if step not in self.opened:
                segment = plan_segment(self._feed, SHARING, step)
                self.opened[step] = split_segment(self._feed, SHARING, segment), segment
        iterators, segment = self.opened[step]
        return Opened(blocks_of(iterators[rank]), segment.stop_step, segment.open_next_at)
