"""Workers that end or stand still while they join: on a real Ray cluster."""

import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from packed import write_packed
from ray import cloudpickle
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util import remove_placement_group

from orchestrator import cluster
from orchestrator.config import Config, DataConfig, ModelConfig, ScalingConfig, TrainConfig
from orchestrator.run import read_events
from orchestrator.train.launch import fit
from orchestrator.train.recovery import starting
from orchestrator.train.recovery.failures import CodeError
from orchestrator.train.recovery.mistakes import diagnose_start
from orchestrator.train.recovery.starting import StartFailed

# The controller cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
LIMIT_S = 15.0
DEAD = WorkerHealthCheckFailedError("the worker ended", ActorDiedError())


def test_what_ended_a_start_is_told_by_what_is_known() -> None:
    def found(errors: dict[int, BaseException], late_s: float = 0.0) -> tuple[str, str]:
        cause = diagnose_start(StartFailed(errors, late_s=late_s), hang_timeout_s=1)
        return cause.cause, cause.error

    lost = CodeError("DistNetworkError: The client socket has timed out", None)
    assert found({0: DEAD, 1: lost})[1].startswith("worker 0's process ended unexpectedly")
    assert found({1: lost})[0] == "process"
    assert found({1: CodeError("ImportError: no torch", None)}) == ("code", "ImportError: no torch")
    assert found({1: DEAD}, 60) == ("hang", "worker 1 did not start within 60 s")
    assert found({0: DEAD, 1: DEAD}, 60)[1].startswith("workers 0, 1 did not start within")
    assert found({}) == ("process", "a worker's process ended while it started")


def test_it_travels_whole() -> None:
    failed = StartFailed({1: ValueError("odd")}, late_s=60, nodes=frozenset("a"))
    read = pickle.loads(pickle.dumps(failed))
    assert (str(read.errors[1]), read.late_s, read.nodes) == ("odd", 60, {"a"})


class Strikes(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Sends one worker a signal while it joins: at the second start one, at the third another.

    The first start's placement group is gone before its workers are created, for which Ray waits
    for ever.

    Args:
        gone: a file that says that this has been done.
    """

    strikes = ((0, signal.SIGKILL), (1, signal.SIGSTOP))

    def __init__(self, gone: Path) -> None:
        self._gone = gone
        self._starts = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        starting._LEAST_S, starting._GONE_S = LIMIT_S, 1.0
        create = WorkerGroup._create_workers

        def create_without_place(
            group: Any, number: int, place: Any, *args: Any, **more: Any
        ) -> Any:
            remove_placement_group(place)
            return create(group, number, place, *args, **more)

        if not self._gone.exists():
            self._gone.touch()
            WorkerGroup._create_workers = create_without_place

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        if self._starts < len(self.strikes):
            rank, number = self.strikes[self._starts]
            args = (workers[rank].metadata.pid, number)
            threading.Thread(target=_strike, args=args, daemon=True).start()
        self._starts += 1
        return {}


def _strike(pid: int, number: int) -> None:
    while b"_prepare" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.01)
    time.sleep(0.3)  # well inside the import of torch
    os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_cluster")
def test_whatever_ends_a_start_another_one_follows(tmp_path: Path) -> None:
    index = write_packed(tmp_path / "data", train=26, val=11)
    config = Config(
        name="joins",
        storage_path=str(tmp_path),
        data=DataConfig(index=index.uri, global_batch=13, image_size=8),
        model=ModelConfig(class_path="modules.UserModule"),
        train=TrainConfig(max_epochs=1, precision="32", hang_timeout_s=LIMIT_S),
        scaling=ScalingConfig(num_workers=2, cpus_per_worker=0.5),
    )
    assert fit(config, show=False, callbacks=[Strikes(tmp_path / "gone")]).result["steps"] == 2
    failures = [e for e in read_events(str(tmp_path / "joins")) if e["event"] == "failure"]
    assert [(f["cause"], f["step"], f["count"]) for f in failures] == [
        ("controller", None, 1),
        ("process", None, 2),
        ("hang", None, 3),
    ]
    said = [f["error"] for f in failures]
    assert said[0] == "the process of Ray Train's controller ended unexpectedly"
    assert said[1].startswith("worker 0's process ended unexpectedly on node")
    assert said[2] == f"worker 1 did not start within {LIMIT_S:g} s"
    assert cluster.groups_of_job() == set()
