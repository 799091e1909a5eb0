"""A Ray cluster of several nodes on this machine, whose nodes tests take away and bring back."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import ray
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.cluster_utils import Cluster

_PREEMPTION = "DRAIN_NODE_REASON_PREEMPTION"
T = TypeVar("T")


class Nodes:
    """The cluster: a head without CPUs, where the driver is, and nodes of one CPU each."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._processes: list[subprocess.Popen[bytes]] = []

    def add(self) -> str:
        """Add a node and return its id."""
        return str(self._cluster.add_node(num_cpus=1).node_id)

    def kill(self, node: str) -> None:
        """End a node's raylet by SIGKILL; its workers end with it."""
        found = next(n for n in self._cluster.worker_nodes if n.node_id == node)
        found.all_processes["raylet"][0].process.kill()

    def drain(self, node: str, *, deadline_s: int) -> None:
        """Announce that a node will be taken away; it goes once nothing runs there."""
        command = ["drain-node", "--address", self._cluster.address, "--node-id", node]
        command += ["--reason", _PREEMPTION, "--reason-message", "test"]
        command += ["--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run([_ray(), *command], check=True, capture_output=True)

    def start_process(self) -> tuple[str, subprocess.Popen[bytes]]:
        """Add a node by `ray start --block`; return its id and the process."""
        before = _alive()
        process = subprocess.Popen(
            [_ray(), "start", "--block", "--address", self._cluster.address, "--num-cpus", "1",
             "--object-store-memory", str(150 * 2**20), "--dashboard-agent-listen-port", "0"],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._processes.append(process)
        wait_for(lambda: _alive() - before, timeout_s=30)
        return next(iter(_alive() - before)), process

    def close(self) -> None:
        """End what `start_process` began."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def wait_for(look: Callable[[], T], *, timeout_s: float) -> T:
    """Return what `look` finds, once it finds something."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"nothing was found for {timeout_s:g} s"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """Start the head and connect to it; other clusters of this process use another token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        patch.setenv("ORCHESTRATOR_RESIZE_EVERY_S", "2")
        reset_auth_token_state()
        cluster = Cluster()
        cluster.add_node(num_cpus=0, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = Nodes(cluster)
        try:
            yield nodes
        finally:
            ray.shutdown()
            nodes.close()
            cluster.shutdown()
    reset_auth_token_state()
