"""A Ray cluster that outlives drivers: what they leave there can be seen, and nodes be killed."""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pytest
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster

from chaos.arena import Arena

# Ray Data's own, one for each cluster.
_KNOWN_ACTORS = ("_StatsActor", "_AutoscalingCoordinatorActor", "_UsageCollectionActor")
_READS = "SplitCoordinator"
T = TypeVar("T")


class Nodes:
    """The cluster, and this process's connection to it.

    Args:
        env: variables of all that it starts.
        cpus: of its head; 0: the head is there for drivers alone.
        others: nodes of one CPU each that may be killed; another one comes for each.
    """

    def __init__(self, env: Mapping[str, str], *, cpus: int, others: int = 0) -> None:
        self._env = env
        with self._environment():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": cpus, "include_dashboard": False},
            )
            self._others = [self._cluster.add_node(num_cpus=1) for _ in range(others)]
        self._cluster.wait_for_nodes()
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")

    @property
    def address(self) -> str:
        """Where drivers find it."""
        return str(self._cluster.address)

    def choose(self, rng: random.Random) -> int:
        """Return the process id of a random node's raylet."""
        return _raylet(rng.choice(self._others))

    def replace(self, pid: int) -> None:
        """Start another node for one whose raylet was killed."""
        node = next(node for node in self._others if _raylet(node) == pid)
        self._others.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        with self._environment():
            self._others.append(self._cluster.add_node(num_cpus=1))

    def held(self) -> Counter[str]:
        """Return how many actors of each class live, and how many placement groups."""
        actors = ray._private.state.actors().values()
        alive = [actor for actor in actors if actor["State"] == "ALIVE"]
        groups = ray.util.placement_group_table().values()
        names = (actor["ActorClassName"] for actor in alive)
        found = Counter(f"actor {name}" for name in names if name not in _KNOWN_ACTORS)
        owners = Counter(
            str(actor["OwnerAddress"]) for actor in alive if actor["ActorClassName"] == _READS
        )
        # A worker that has validated holds two; those of a worker that is gone are one too many.
        found[f"actor {_READS}"] = sum(max(1, number - 1) for number in owners.values())
        found["placement group"] = sum(group["state"] != "REMOVED" for group in groups)
        return +found

    def grown(self, before: Counter[str], *, patience_s: float = 20.0) -> list[str]:
        """Return what is held beyond what was `before`, once that had time to end."""
        more = _await_nothing(lambda: self.held() - before, patience_s)
        return [f"{count} more {name}" for name, count in sorted(more.items())]

    def left_over(self, *, patience_s: float = 20.0) -> list[str]:
        """Return what outlived all runs: actors, placement groups, objects that somebody refers to.

        Others are `forgotten`.
        """
        found = self.grown(Counter(), patience_s=patience_s)
        pinned = _await_nothing(lambda: self._stored().object_store_bytes_primary_copy, patience_s)
        return found + [f"{pinned} bytes pinned in shared memory"] * bool(pinned)

    def forgotten(self) -> int:
        """Return the bytes in the object stores that nobody refers to.

        Ray 2.60's raylet now and then keeps the arguments of a task whose process was killed, some
        7 kB of a read task: its debug_state.txt names the same bytes as "pinned lease arguments".
        """
        stats = self._stored()
        return int(stats.object_store_bytes_used - stats.object_store_bytes_primary_copy)

    def _stored(self) -> Any:
        return get_memory_info_reply(get_state_from_address(self.address)).store_stats

    def stop(self) -> None:
        """End all nodes."""
        ray.shutdown()
        self._cluster.shutdown()

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._env.items():
                patch.setenv(name, value)
            patch.delenv("RAY_ADDRESS", raising=False)
            yield


@contextlib.contextmanager
def nodes_for(arena: Arena, *, lose: bool = False) -> Iterator[Nodes]:
    """Run a cluster for all drivers of a run; `lose`: its nodes may be killed."""
    workers = arena.config.scaling.max_workers
    cpus, others = (0, workers + 1) if lose else (workers, 0)
    nodes = Nodes(arena.env, cpus=cpus, others=others)
    arena.address = nodes.address
    try:
        yield nodes
    finally:
        arena.end()
        nodes.stop()


def _await_nothing(look: Callable[[], T], patience_s: float) -> T:
    """Return what `look` finds, once it finds nothing or patience ends."""
    deadline = time.monotonic() + patience_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _raylet(node: object) -> int:
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]
