"""Controller side: how many workers a run gets as nodes come and go, and what preempted them.

Ray 2.60's own elastic policy counts nodes as they were up to 20 s ago, draining ones among them,
and then waits 60 s for workers that find no place; it also ends running workers to resize, with
all steps since the last commit. So we count, and workers end themselves after a commit.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroupPollStatus,
    WorkerGroupState,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group_table

from orchestrator.config import ScalingConfig
from orchestrator.train.recovery.group import GroupConfig, without_datasets
from orchestrator.train.recovery.interrupt import abort_at_interrupt
from orchestrator.train.recovery.notice import Refused, drained
from orchestrator.train.recovery.starting import StartInTime

# Ray's controller asks again at once where it is told to wait.
_WAIT_S = 0.5
# A node that died counts as alive for some 5 s more: how long workers may wait for a place there
# before they are counted again.
_PLACE_S = "15"


@dataclasses.dataclass(frozen=True)
class Group:
    """A placement group: what it holds where."""

    id: str
    held: tuple[tuple[str, Mapping[str, float]], ...]
    """(node, resources) of each of its bundles that has a place."""


def room(
    nodes: Mapping[str, Mapping[str, float]],
    groups: Sequence[Group],
    scaling: ScalingConfig,
    *,
    own: str | None = None,
) -> int:
    """Return how many workers, at most the most that a run uses, find a place.

    Args:
        nodes: resources of each node that may be used.
        groups: what placement groups hold; tasks without one are taken to end soon.
        scaling: what a worker needs.
        own: the group of the run's own workers, which makes room for the next.
    """
    free = {node: dict(resources) for node, resources in nodes.items()}
    for group in groups:
        for node, held in group.held if group.id != own else ():
            for kind, amount in held.items() if node in free else ():
                free[node][kind] = free[node].get(kind, 0) - amount
    needs = (("CPU", scaling.cpus_per_worker), ("GPU", scaling.gpus_per_worker))
    fits = [
        # Sums of fractions fall short of whole numbers.
        min(int(has.get(kind, 0) / need + 1e-6) for kind, need in needs if need > 0)
        for has in free.values()
    ]
    return min(scaling.max_workers, sum(max(0, number) for number in fits))


def usable_nodes() -> dict[str, dict[str, float]]:
    """Return the resources of all nodes that are alive and not being drained."""
    draining = draining_nodes()
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    }


def free_nodes() -> dict[str, dict[str, float]]:
    """Return what nobody holds of all nodes that are alive and not being drained."""
    usable = usable_nodes()
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return {node: has for node, has in free.items() if node in usable}


def draining_nodes() -> dict[str, int]:
    """Return the nodes being drained with their deadlines in ms since 1970, 0: none."""
    # Ray's own watcher takes it from here, too; there is no public way to the deadlines.
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


def refuse_drained_node(*, step: int) -> None:
    """Start nothing on a node that is being drained since this worker was placed there.

    It takes no new actors, such as readers; and no step is lost yet.

    Raises:
        Refused: this worker's node is being drained.
    """
    notice = drained([ray.get_runtime_context().get_node_id()], draining_nodes())
    if notice is not None:
        raise Refused(step, notice.deadline_s)


def placed_groups() -> list[Group]:
    """Return the placement groups of the cluster that hold something."""
    groups = []
    for number, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            nodes = group["bundles_to_node_id"]
            held = tuple((nodes[i], group["bundles"][i]) for i in nodes if nodes[i])
            groups.append(Group(number, held))
    return groups


def fewer(found: int, tried: int | None, scaling: ScalingConfig) -> int:
    """Return how many workers to try: one less each time, as others hold what cannot be counted.

    Args:
        found: how many there is room for.
        tried: how many were tried last and found no place; None: they did.
        scaling: how many there may be.
    """
    return found if tried is None else max(scaling.min_workers, min(found, tried - 1))


class FollowCluster(ElasticScalingPolicy):  # type: ignore[misc]
    """Starts as many workers as there is room for now; running ones are left alone.

    Args:
        ours: what a worker needs, and how many there may be.
        scaling_config: the same for Ray.
        board: where to say that the run waits.
    """

    def __init__(
        self, ours: ScalingConfig, scaling_config: ray.train.ScalingConfig, board: Any
    ) -> None:
        super().__init__(scaling_config)
        self._ours = ours
        self._board = board
        self._group: str | None = None
        self._said: int | None = None
        self._tried: int | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start where there is room for the fewest workers, else wait."""
        self._maybe_send_resource_request()
        found = room(usable_nodes(), placed_groups(), self._ours, own=self._group)
        if found >= self._ours.min_workers:
            self._said = None
            self._tried = fewer(found, self._tried, self._ours)
            return self._get_resize_decision(self._tried)
        if self._said != found:
            self._said = found
            self._board.say.remote(
                f"waiting for nodes: there is room for {found} workers, and "
                f"scaling.num_workers=[{self._ours.min_workers}, {self._ours.max_workers}]; add "
                "nodes, or submit again with fewer"
            )
        time.sleep(_WAIT_S)
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Keep asking the autoscaler for the most; workers see by themselves that it came."""
        self._maybe_send_resource_request()
        self._tried = None
        self._group = worker_group_state.placement_group_handle.placement_group.id.hex()
        return NoopDecision()


def nodes_of(worker_group: Any) -> set[str]:
    """Return the nodes of a worker group that has started."""
    return {worker.metadata.node_id for worker in worker_group.get_workers()}


class RunTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer, whose number of workers follows the cluster as we count it.

    Args:
        function: what each worker runs.
        scaling: how many workers there may be, and what each reserves.
        board: the progress board.
        settings: what else `DataParallelTrainer` takes.
    """

    def __init__(
        self, function: Any, *, scaling: ScalingConfig, board: Any, **settings: Any
    ) -> None:
        super().__init__(
            function,
            backend_config=GroupConfig("nccl" if scaling.gpus_per_worker > 0 else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=scaling.num_workers,
                use_gpu=scaling.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": scaling.cpus_per_worker,
                    "GPU": scaling.gpus_per_worker,
                },
            ),
            **settings,
        )
        self._ours = scaling
        self._board = board

    def _create_default_callbacks(self) -> list[Any]:
        # A detached actor for each start, which stays for ever where its controller is killed in
        # a cluster without a dashboard. The driver frees the workers itself, see again.py.
        made = without_datasets(super()._create_default_callbacks())
        kept = [c for c in made if not isinstance(c, PlacementGroupCleanerCallback)]
        return [StartInTime(), *kept]

    def _register_sigint_handler(self, controller: Any) -> None:
        abort_at_interrupt(controller)

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        if self._ours.is_elastic:
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _PLACE_S)
            policy = FollowCluster(self._ours, self.scaling_config, self._board)
            arguments = {**arguments, "scaling_policy": policy}
        return super()._initialize_and_run_controller(**arguments)
