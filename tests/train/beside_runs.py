"""A run that validates beside training, and what it wrote down of that."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from packed import write_packed

from orchestrator.config import (
    BesideConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
    ValidateConfig,
)


def make_config(folder: Path, name: str, module: str, **init_args: Any) -> Config:
    index = write_packed(folder / "data", train=40, val=9)
    return Config(
        name=name,
        storage_path=str(folder),
        data=DataConfig(
            index=index.uri, global_batch=6, max_micro_batch=2, eval_batch=2, image_size=8
        ),
        model=ModelConfig(class_path=f"modules.{module}", init_args=init_args),
        train=TrainConfig(
            max_epochs=60,
            strategy="ddp",
            precision="32",
            early_stopping=EarlyStoppingConfig(patience=2),
            validate=ValidateConfig(every_samples=30, beside=BesideConfig(cpus=1)),
            checkpoint=CheckpointConfig(every_steps=2, keep=1),
        ),
        scaling=ScalingConfig(num_workers=2),
    )


def validated(run: str) -> list[tuple[int, float]]:
    rows = pq.read_table(f"{run}/metrics.parquet").to_pylist()
    return [(row["step"], row["value"]) for row in rows if row["name"] == "val_loss"]
