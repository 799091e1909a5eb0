"""Every setting of a run, as frozen dataclasses with a docstring under each field.

Pure: imports neither Ray nor torch, so reading and checking a config costs milliseconds.
"""

import dataclasses
from typing import Any, Literal

Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero3"]
Precision = Literal["auto", "32", "bf16", "16"]
Mode = Literal["min", "max"]


class UserError(ValueError):
    """A mistake only the user can mend: one sentence with field, rule, value and remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and in which order."""

    index: str = ""
    """URI of the packed data set: the folder that `orchestrator pack --out` wrote."""
    global_batch: int = 256
    """Samples per optimizer step, whatever the number of workers."""
    max_micro_batch: int = 64
    """Most samples one worker pushes through the model at once; the rest is accumulated."""
    eval_batch: int = 256
    """Most samples one worker pushes through the model at once without gradients."""
    image_size: int = 224
    """Side of the square images the model sees, in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random resized crop covers."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest width / height of a random resized crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    eval_crop: float = 0.875
    """Share of the shorter side that the centre crop of evaluation covers."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean (RGB, scale 0 to 1) subtracted on the training device."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation (RGB, scale 0 to 1) divided by on the training device."""
    window_chunks: int = 16
    """Consecutive chunks of the shuffled chunk order whose samples are shuffled together."""
    decode_slots: int | None = None
    """Decode tasks that run at once; null: the CPUs the workers leave, else all CPUs, shared.
    On an autoscaling cluster a number asks for loader nodes with as many CPUs."""
    audit: bool = False
    """Write which sample ids each committed step consumed to `samples/` in the run folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The user's LightningModule, named the way LightningCLI users name it."""

    class_path: str = "orchestrator.train.module.ImageClassifier"
    """Import path of a LightningModule; its training_step gets {"image", "label", "id"}."""
    init_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of its constructor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Stop when validation no longer improves, and keep the best weights."""

    monitor: str = "val_loss"
    """Name of a logged validation metric."""
    mode: Mode = "min"
    """Whether smaller or larger is better."""
    patience: int = 10
    """Validations in a row without improvement before the run stops."""
    min_delta: float = 0.0
    """Smallest change that counts as an improvement."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are committed besides each epoch's end, and how many are kept."""

    every_steps: int | None = None
    """Commit every this many steps."""
    every_seconds: float | None = 600.0
    """Commit when this many seconds have passed since the last commit."""
    keep: int = 2
    """Most recent checkpoints kept, besides the best one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model is trained."""

    max_epochs: int = 90
    """Upper bound on passes over the training data."""
    strategy: Strategy = "auto"
    """How gradients and states are shared between workers; auto is ddp."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward; auto takes what this hardware gains from."""
    gradient_clip_norm: float | None = None
    """Largest 2-norm of a step's gradient; null: no clipping."""
    early_stopping: EarlyStoppingConfig | None = dataclasses.field(
        default_factory=EarlyStoppingConfig
    )
    """null switches early stopping off."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are committed and how many are kept."""
    max_failures: int = 3
    """Worker failures after which the run gives up; each restarts from the last checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The only section that differs between a laptop and a cluster."""

    num_workers: int = 1
    """Ray Train workers (processes that hold a copy or a shard of the model)."""
    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker."""
    gpus_per_worker: float = 0.0
    """GPUs reserved for each worker."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """A sweep over dotted config paths."""

    metric: str = "val_loss"
    """Logged validation metric that trials are compared by."""
    mode: Mode = "min"
    """Whether smaller or larger is better."""
    num_samples: int = 20
    """Trials (for each point of a grid, where the space has grids)."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha prunes trials at rungs; none lets each run to its own end."""
    grace_epochs: int = 1
    """First rung: no trial is pruned before this many epochs."""
    reduction_factor: int = 3
    """Share kept at each rung is one in this many; rungs grow by the same factor."""
    max_concurrent_trials: int | None = None
    """Trials that run at once; null: as many as the cluster's CPUs and GPUs hold."""
    space: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Dotted config path -> {uniform|loguniform: [low, high], choice|grid: [...], randint: ...}."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run: everything that `orchestrator train` needs to know."""

    name: str = ""
    """The run's name: submitting it again resumes it."""
    storage_path: str = "./runs"
    """Local folder or s3:// URI under which the run's folder lies."""
    seed: int = 0
    """Keys the order of samples, the augmentation and the model's initial weights."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What is trained on and in which order."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The LightningModule."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How it is trained."""
    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)
    """On how many workers."""
    tune: TuneConfig | None = None
    """The sweep, where `orchestrator tune` reads this config."""
