"""A run in a thread of the test, on nodes that the test takes away and brings back."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray_nodes import wait_for

from orchestrator.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
)
from orchestrator.run import read_events
from orchestrator.train.launch import RunResult, fit
from orchestrator.train.saving import checkpoint

TRAIN, BATCH, EPOCHS, EVERY = 91, 13, 25, 10


def make_config(root: Path, name: str, *, workers: int | tuple[int, int], step_s: float) -> Config:
    nodes = root / f"nodes-{name}"
    nodes.mkdir()
    return Config(
        name=name,
        storage_path=str(root),
        data=DataConfig(
            index=str(root / "data"),
            global_batch=BATCH,
            max_micro_batch=BATCH,
            eval_batch=8,
            image_size=8,
            window_chunks=3,
            audit=True,
        ),
        model=ModelConfig(
            class_path="modules.Slow", init_args={"folder": str(nodes), "step_s": step_s}
        ),
        train=TrainConfig(
            max_epochs=EPOCHS,
            strategy="ddp",
            precision="32",
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=EVERY),
            max_failures=1,
        ),
        scaling=ScalingConfig(num_workers=workers),
    )


def starts_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "training"]


def batches_of(run: str) -> dict[int, list[tuple[int, str]]]:
    """Return the samples of each committed step; the audit is deleted where a step is undone."""
    rows = pq.read_table(f"{run}/samples").to_pylist()
    steps: dict[int, list[tuple[int, str]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append((row["epoch"], row["id"]))
    return {step: sorted(samples) for step, samples in sorted(steps.items())}


class Driver:
    """Runs `fit` in a thread, while the test takes nodes away."""

    def __init__(self, config: Config) -> None:
        self.run = str(Path(config.storage_path) / config.name)
        self.nodes = Path(config.model.init_args["folder"])
        self._outcome: list[RunResult | BaseException] = []
        self._config = config
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._outcome.append(fit(self._config))
        except BaseException as error:  # shown by the test's thread
            self._outcome.append(error)

    def finish(self) -> RunResult:
        self._thread.join(120)
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def wait(self, look: Callable[[], Any], *, timeout_s: float = 60) -> Any:
        def look_or_fail() -> Any:
            assert not self._outcome, self._outcome
            return look()

        return wait_for(look_or_fail, timeout_s=timeout_s)

    def wait_for_start(self, number: int, *, workers: int) -> None:
        """Wait until start `number` (from 1 on) trains on as many workers."""
        events = self.wait(
            lambda: len(found := starts_of(read_events(self.run))) >= number and found
        )
        start = events[number - 1]
        assert start["workers"] == workers
        self.wait(lambda: (steps := self.steps()) and steps[-1] >= start["step"] + 3)

    def steps(self) -> list[int]:
        """Return the steps that worker 0 has begun, one after the other."""
        path = self.nodes / "steps"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_for_commit(self) -> None:
        """Wait for the first commit."""
        self.wait(lambda: checkpoint.list_manifests(self.run))

    def node_of(self, rank: int) -> str:
        return (self.nodes / f"rank-{rank}").read_text()
