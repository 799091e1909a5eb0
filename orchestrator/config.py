"""Every setting of a run, as frozen dataclasses with a docstring under each field.

Pure: imports neither Ray nor torch, so reading and checking a config costs milliseconds.
A config is data; `with_overrides` returns a changed copy and nothing is ever patched in place.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_type_hints

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


# What may differ when a run is resubmitted: neither the data's order nor a step's arithmetic
# depends on these.
_FREE_TO_CHANGE = (
    "storage_path",
    "data.max_micro_batch",
    "data.eval_batch",
    "data.decode_slots",
    "train.checkpoint",
    "train.early_stopping",
    "train.max_epochs",
    "train.max_failures",
    "scaling",
    "tune",
)

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as plain dicts, lists and scalars, ready for YAML or JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def known_keys(section: type = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of a config, sections included."""
    keys = []
    for name, hint in get_type_hints(section).items():
        keys.append(f"{prefix}{name}")
        inner = section_of(hint)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else []
    return keys


def section_of(hint: Any) -> type | None:
    """Return the dataclass that a field's type names, if any."""
    options = (hint, *get_args(hint))
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def unknown_key_message(key: str, known: list[str]) -> str:
    """Return the sentence for a config key that does not exist, with the nearest valid one."""
    every = [k for k in known_keys() if not key.startswith(f"{k}.")]
    leaf = key.rsplit(".", 1)[-1]
    near = [k for k in every if k.rsplit(".", 1)[-1] == leaf][:1]
    near = near or difflib.get_close_matches(key, every, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(known)}."
    return f"config key {key!r} does not exist: {hint}"


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a copy of `config` with dotted paths set, e.g. {"model.init_args.lr": 0.1}.

    Raises:
        UserError: a path names no field.
    """
    for path, value in overrides.items():
        config = _replace(config, path, path.split("."), value)
    return config


def _replace(section: T, path: str, parts: list[str], value: Any) -> T:
    head, rest = parts[0], parts[1:]
    if isinstance(section, dict):
        inner = _replace(section.get(head, {}), path, rest, value) if rest else value
        return {**section, head: inner}  # type: ignore[return-value]
    fields = _field_names(section)
    if head not in fields:
        prefix = ".".join(path.split(".")[: -len(parts)])
        raise UserError(unknown_key_message(path, [f"{prefix}.{f}".lstrip(".") for f in fields]))
    inner = _replace(getattr(section, head), path, rest, value) if rest else value
    return dataclasses.replace(section, **{head: inner})  # type: ignore[type-var]


def _field_names(value: object) -> list[str]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [f.name for f in dataclasses.fields(value)]
    return []


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identity(config: Config) -> dict[str, Any]:
    """Return the dotted settings that make a run this run: all but those free to change."""
    flat = flatten(to_dict(config))
    return {k: v for k, v in flat.items() if not f"{k}.".startswith(_FREE_PREFIXES)}


_FREE_PREFIXES = tuple(f"{prefix}." for prefix in _FREE_TO_CHANGE)


def config_digest(config: Config) -> str:
    """Return a SHA-256 (hex) of what `identity` returns."""
    canonical = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
