"""Controller side: the workers' process group, set up without importing torch in the controller.

Ray Train's own `TorchConfig` imports torch wherever it is unpickled: 1.5 s between the command and
the first worker, and four rounds of calls to the workers where one does.
"""

import dataclasses
import os
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.util import TrainingFramework

from orchestrator.train.recovery.starting import all_of
from orchestrator.train.timing.startup import importing


@dataclasses.dataclass
class GroupConfig(BackendConfig):  # type: ignore[misc]
    """A torch process group over all workers, as `TorchConfig` makes it."""

    backend: str
    """gloo or nccl."""
    timeout_s: int = 1800
    """Seconds after which a collective fails."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What sets the group up."""
        return GroupBackend

    @property
    def train_func_context(self) -> Any:
        """What selects the device around the training function; asked for by the driver."""
        from ray.train.torch import TorchConfig

        return TorchConfig().train_func_context

    @property
    def framework(self) -> TrainingFramework:
        """What Ray's dashboard shows."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return {"backend": self.backend, "timeout_s": self.timeout_s}


class GroupBackend(Backend):  # type: ignore[misc]
    """Runs in the controller, calls the workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Let all workers join.

        In two rounds: one that dies or stands still in the first, which takes the time, is known.

        Raises:
            StartFailed: one did not.
        """
        places = all_of(worker_group.execute_async(_prepare))
        address, port = places[0]
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank,
                _join,
                backend=backend_config.backend,
                world_rank=rank,
                size=size,
                address=address,
                port=port,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(size)
        ]
        all_of(joining)

    def on_shutdown(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Let all workers leave, as far as they still answer."""
        timeout_s = int(
            os.environ.get(
                TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
                DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
            )
        )
        leaving = worker_group.execute_async(_leave, destroy=len(worker_group) > 1)
        try:
            ray.get(leaving, timeout=timeout_s)
        except GetTimeoutError:
            return  # one that hangs does not leave: its process is ended next


class NoDatasets(WorkerGroupCallback):  # type: ignore[misc]
    """In place of Ray Train's actor for data sets, a second of a start: workers read themselves."""

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[None]]:
        """Return what each worker's context gets."""
        return {"dataset_shard_provider": [None] * len(workers)}


def without_datasets(callbacks: list[Any]) -> list[Any]:
    """Return Ray Train's callbacks, with none that starts the actor for data sets."""
    return [NoDatasets() if isinstance(c, DatasetsCallback) else c for c in callbacks]


def _prepare() -> tuple[str, int]:
    with importing():
        from ray.train.torch import config  # noqa: F401  (what the group's start asks for next)
    address, port = get_address_and_port()
    return address, port


def _join(
    *, backend: str, world_rank: int, size: int, address: str, port: int, timeout_s: int
) -> None:
    from ray.train.torch import config

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(
        backend=backend,
        world_rank=world_rank,
        world_size=size,
        init_method="env://",
        timeout_s=timeout_s,
    )


def _leave(*, destroy: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=destroy)
