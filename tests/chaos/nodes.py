"""A cluster of several nodes on this machine, whose raylets can be killed."""

import os
import random
import time

import ray
from ray.cluster_utils import Cluster

from chaos import victims


class Nodes:
    """A head and worker nodes of one CPU each; a killed one comes back after a while."""

    def __init__(self, mark_name: str, mark: str, *, num_nodes: int) -> None:
        # Inherited by all that the cluster starts.
        os.environ[mark_name] = mark
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self._others = [self._cluster.add_node(num_cpus=1) for _ in range(num_nodes)]
        self._cluster.wait_for_nodes()
        del os.environ[mark_name]
        self._mark = (mark_name, mark)

    @property
    def address(self) -> str:
        """Where drivers find it."""
        return str(self._cluster.address)

    def kill_one(self, rng: random.Random) -> int:
        """Kill the raylet of a random worker node abruptly and start another; return its pid."""
        node = rng.choice(self._others)
        pid = int(node.all_processes["raylet"][0].process.pid)
        victims.kill(pid)
        self._others.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        os.environ[self._mark[0]] = self._mark[1]
        self._others.append(self._cluster.add_node(num_cpus=1))
        del os.environ[self._mark[0]]
        return pid

    def left_over(self) -> list[str]:
        """Return actors and placement groups that outlived all runs, once they had time to end."""
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        try:
            deadline = time.monotonic() + 20
            while (found := _alive()) and time.monotonic() < deadline:
                time.sleep(0.5)
            return found
        finally:
            ray.shutdown()

    def stop(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def _alive() -> list[str]:
    groups = ray.util.placement_group_table().values()
    held = [f"placement group {g['placement_group_id']}" for g in groups if g["state"] != "REMOVED"]
    actors = ray._private.state.actors().values()
    # Ray Data's own, one for each cluster.
    known = ("_StatsActor", "_AutoscalingCoordinatorActor")
    return held + [
        f"actor {a['ActorClassName']}"
        for a in actors
        if a["State"] == "ALIVE" and a["ActorClassName"] not in known
    ]
