"""Every setting of a run, as frozen dataclasses with a docstring under each field.

Pure: imports neither Ray nor torch, so reading and checking a config costs milliseconds.
"""

import dataclasses
from typing import Any, ClassVar, Literal

Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero3"]
Precision = Literal["auto", "32", "bf16", "16"]
Mode = Literal["min", "max"]
ClassWeights = Literal["balanced"] | dict[str, float]
Policy = Literal["none", "randaugment", "trivialaugment"]


class UserError(ValueError):
    """A mistake only the user can mend: one sentence with field, rule, value and remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixPart:
    """One index of a mix."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    index: str
    """URI of a packed data set; all parts must have the same classes."""
    weight: float | None = None
    """Relative share of the samples of every window; null for all: in proportion to their sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images after crop and flip, on the training device."""

    brightness: float = 0.0
    """Colour jitter: brightness is multiplied by a factor from 1 - this to 1 + this; 0: none."""
    contrast: float = 0.0
    """Colour jitter: the same for contrast."""
    saturation: float = 0.0
    """Colour jitter: the same for saturation."""
    hue: float = 0.0
    """Colour jitter: hue is turned by up to this share of the circle either way, at most 0.5."""
    policy: Policy = "none"
    """randaugment: `num_ops` random operations of strength `magnitude`; trivialaugment: one of any
    strength."""
    num_ops: int = 2
    """Operations of randaugment, one after the other."""
    magnitude: int = 9
    """Strength of randaugment, from 0 to 30."""
    transforms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Transforms of torchvision.transforms.v2 or your own, each {class_path, init_args}, given one
    uint8 image (3, S, S) at a time; slower than those above, which change a whole batch at once."""
    erasing: float = 0.0
    """Probability that a rectangle is filled with the mean colour (random erasing)."""
    erasing_scale: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest share of the image's area that is erased."""
    erasing_ratio: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height / width of the erased rectangle."""
    mixup_alpha: float = 0.0
    """mixup: the weight of an image against its partner is from Beta(alpha, alpha); 0: none."""
    cutmix_alpha: float = 0.0
    """cutmix: the same for the area that stays; 0: none. With both, half the images get each."""
    mix_prob: float = 1.0
    """Probability that an image is mixed, where mixup or cutmix is on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and in which order."""

    index: str = ""
    """URI of the packed data set: the folder that `orchestrator pack --out` wrote."""
    mix: tuple[MixPart, ...] = ()
    """Several packed data sets in place of `index`: a list of {index: URI, weight: number}."""
    class_weights: ClassWeights | None = None
    """Repeat samples by class: balanced, or {class name: weight} (1 where it is not named)."""
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
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Further random changes of training images."""
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
    max_bad_fraction: float = 0.01
    """Share of images that may be undecodable before the run is stopped, judged from 10,000 on."""
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
    divergence_threshold: float | None = None
    """Stop the run as diverged where the metric is worse than this; null: only where it is NaN or
    infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideConfig:
    """What validation beside training reserves, besides the workers' own CPUs and GPUs."""

    cpus: float = 1.0
    """CPUs of the process that validates; it reads and decodes in as many threads."""
    gpus: float = 0.0
    """GPUs of that process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """When the model is validated besides each epoch's end, and where."""

    every_samples: int | None = None
    """Validate after the first step that passes a multiple of this many training samples."""
    beside: BesideConfig | None = None
    """Validate checkpoints in a process of its own while training goes on; null: the workers stop
    training and validate."""

    @property
    def cpus(self) -> float:
        """CPUs reserved besides those of the workers."""
        return self.beside.cpus if self.beside else 0.0

    @property
    def gpus(self) -> float:
        """GPUs reserved besides those of the workers."""
        return self.beside.gpus if self.beside else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are committed besides each epoch's end, and how many are kept."""

    every_steps: int | None = None
    """Commit every this many steps."""
    every_seconds: float | None = 600.0
    """Commit when this many seconds have passed since the last commit."""
    keep: int = 2
    """Most recent checkpoints kept, besides the best one."""
    max_age_s: float = 3600.0
    """Seconds that training goes on while checkpoints cannot be saved; then the run fails."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model is trained."""

    max_epochs: int = 90
    """Upper bound on passes over the training data."""
    strategy: Strategy = "auto"
    """How gradients and states are shared between workers; auto takes the simplest that fits."""
    offload_optimizer: bool = False
    """Keep ZeRO's optimizer states in the nodes' memory in place of the GPUs', and step there."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward; auto takes what this hardware gains from."""
    gradient_clip_norm: float | None = None
    """Largest 2-norm of a step's gradient; null: no clipping."""
    early_stopping: EarlyStoppingConfig | None = dataclasses.field(
        default_factory=EarlyStoppingConfig
    )
    """null switches early stopping off."""
    validate: ValidateConfig = dataclasses.field(default_factory=ValidateConfig)
    """When and where the model is validated."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are committed and how many are kept."""
    max_failures: int = 8
    """Failures within 24 hours that the run survives, each by a start from the last checkpoint; the
    same one three times at one step always ends it, and preemptions do not count."""
    loggers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Lightning loggers besides TensorBoard's, MLFlowLogger say: each {class_path, init_args}."""
    hang_timeout_s: float = 120.0
    """Seconds without a sign of life after which a worker counts as hanging: a failure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The only section that differs between a laptop and a cluster."""

    num_workers: int | tuple[int, int] = 1
    """Ray Train workers (processes that hold a copy or a shard of the model); [min, max]: as many
    as the nodes that are there hold, fewer when one leaves, more when one comes."""
    cpus_per_worker: float = 1.0
    """CPUs reserved for each worker."""
    gpus_per_worker: float = 0.0
    """GPUs reserved for each worker."""

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return not isinstance(self.num_workers, int)


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

    def reserved_cpus(self, num_workers: int) -> float:
        """Return the CPUs that a run of so many workers reserves, validation beside it included."""
        return num_workers * self.scaling.cpus_per_worker + self.train.validate.cpus

    def reserved_gpus(self, num_workers: int) -> float:
        """Return the same for GPUs."""
        return num_workers * self.scaling.gpus_per_worker + self.train.validate.gpus
