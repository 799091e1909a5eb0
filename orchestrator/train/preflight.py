"""Driver side: everything about a run that can be wrong is found here, before anything starts."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from orchestrator.config import ClassWeights, Config, ScalingConfig, UserError
from orchestrator.data import balance
from orchestrator.data.augmentation import augment
from orchestrator.data.index import Index
from orchestrator.data.sources import read_data, verify_data
from orchestrator.train import model
from orchestrator.train.logs import loggers
from orchestrator.train.module import ImageClassifier, check_label_kind
from orchestrator.train.recovery import elastic
from orchestrator.train.saving import checkpoint
from orchestrator.train.validation import monitor


def check_config(config: Config) -> None:
    """Check what needs neither storage nor Ray.

    Raises:
        UserError: a field's value cannot work.
    """
    data, train, scaling = config.data, config.train, config.scaling
    stopping, apart = train.early_stopping, train.validate.beside
    inside = ".." not in config.name.split("/") and not config.name.startswith("/")
    rule = "must be a folder name; choose one such as my-run"
    _require("name", config.name, config.name and inside, rule)
    rule = "must name what `orchestrator pack --out` wrote"
    _require("data.index", data.index, data.index or data.mix, rule)
    for key, value in (
        ("data.global_batch", data.global_batch),
        ("data.max_micro_batch", data.max_micro_batch),
        ("data.eval_batch", data.eval_batch),
        ("data.image_size", data.image_size),
        ("data.window_chunks", data.window_chunks),
        ("data.decode_slots", data.decode_slots),
        ("train.max_epochs", train.max_epochs),
        ("train.checkpoint.keep", train.checkpoint.keep),
        ("train.checkpoint.every_steps", train.checkpoint.every_steps),
        ("train.early_stopping.patience", stopping.patience if stopping else None),
        ("train.validate.every_samples", train.validate.every_samples),
        ("scaling.num_workers", scaling.min_workers),
    ):
        _require(key, value, value is None or value >= 1, "must be at least 1; raise it")
    if scaling.min_workers > scaling.max_workers:
        raise UserError(
            f"scaling.num_workers=[{scaling.min_workers}, {scaling.max_workers}] must ascend: the "
            "fewest workers, then the most; swap them."
        )
    for key, number in (
        ("train.checkpoint.every_seconds", train.checkpoint.every_seconds),
        ("train.checkpoint.max_age_s", train.checkpoint.max_age_s),
        ("train.hang_timeout_s", train.hang_timeout_s),
        ("train.gradient_clip_norm", train.gradient_clip_norm),
        ("scaling.cpus_per_worker", scaling.cpus_per_worker),
        ("train.validate.beside.cpus", apart.cpus if apart else None),
    ):
        _require(key, number, number is None or number > 0, "must be above 0; raise it")
    most = train.max_failures
    _require("train.max_failures", most, most >= 0, "must be at least 0; raise it")
    delta, limit = (stopping.min_delta, stopping.divergence_threshold) if stopping else (0, None)
    rule = "must be a number from 0 on; raise it"
    _require("train.early_stopping.min_delta", delta, 0 <= delta < math.inf, rule)
    rule = "must be a number, or null; change it"
    is_number = limit is None or not math.isnan(limit)
    _require("train.early_stopping.divergence_threshold", limit, is_number, rule)
    gpus = scaling.gpus_per_worker
    _require("scaling.gpus_per_worker", gpus, gpus >= 0, "must be at least 0; raise it")
    gpus = train.validate.gpus
    _require("train.validate.beside.gpus", gpus, gpus >= 0, "must be at least 0; raise it")
    rule = "must be from 0 to 4294967295; choose such a number"
    _require("seed", config.seed, 0 <= config.seed < 2**32, rule)
    low, high = data.crop_scale
    rule = "must be two ascending shares above 0 and up to 1, e.g. [0.08, 1.0]"
    _require("data.crop_scale", [low, high], 0 < low <= high <= 1, rule)
    low, high = data.crop_ratio
    rule = "must be two ascending numbers above 0, e.g. [0.75, 1.3333]"
    _require("data.crop_ratio", [low, high], 0 < low <= high, rule)
    _require("data.flip", data.flip, 0 <= data.flip <= 1, "must be a probability, from 0 to 1")
    share = data.max_bad_fraction
    _require("data.max_bad_fraction", share, 0 <= share <= 1, "must be a share, from 0 to 1")
    rule = "must be a share above 0 and up to 1, e.g. 0.875"
    _require("data.eval_crop", data.eval_crop, 0 < data.eval_crop <= 1, rule)
    _require("data.std", list(data.std), min(data.std) > 0, "must be above 0, e.g. 0.225 each")
    workers = scaling.max_workers
    rule = f"must be at least scaling.num_workers={workers}; raise it or lower that"
    enough = data.global_batch >= workers
    _require("data.global_batch", data.global_batch, enough, rule)


def _require(key: str, value: Any, holds: object, rule: str) -> None:
    if not holds:
        raise UserError(f"{key}={value!r} {rule}.")


def check_data(config: Config) -> Index:
    """Read and check the index, and hold the config against it.

    Raises:
        UserError: there is no data set, it was changed, or the config does not fit it.
    """
    index = read_data(config.data)
    if "train" not in index.splits:
        raise UserError(f"{index.uri} has no training images; pack it with smaller fractions.")
    verify_data(config.data)
    augment.check(config.data, label_kind=index.label_kind)
    if config.data.class_weights is not None:
        _check_class_weights(config.data.class_weights, index)
    samples, workers = index.splits["train"].samples, config.scaling.max_workers
    rule = f"is larger than the {samples} training images of {index.uri}; lower it"
    batch = config.data.global_batch
    _require("data.global_batch", batch, batch <= samples, rule)
    if "val" not in index.splits:
        _check_without_validation(config, index)
    elif index.splits["val"].samples < workers:
        raise UserError(
            f"scaling.num_workers={workers} is more than the {index.splits['val'].samples} "
            f"validation images of {index.uri}; use fewer workers or a larger --val-fraction."
        )
    return index


def _check_without_validation(config: Config, index: Index) -> None:
    for key, value in (
        ("train.early_stopping", config.train.early_stopping),
        ("train.validate.every_samples", config.train.validate.every_samples),
        ("train.validate.beside", config.train.validate.beside),
    ):
        if value is not None:
            raise UserError(
                f"{key} needs validation images but {index.uri} has none; pack with "
                f"--val-fraction 0.1, or set {key} to null."
            )


def _check_class_weights(weights: ClassWeights, index: Index) -> None:
    balance.class_weights(
        weights,
        classes=index.classes,
        class_samples=index.class_samples,
        label_kind=index.label_kind,
    )


def check_model(config: Config, index: Index) -> None:
    """Import the model's class and hold its arguments against its constructor.

    Raises:
        UserError: the class does not import, does not take the arguments, or does not validate
            what early stopping watches.
    """
    model.refuse_second_lightning()
    model.init_args(config.model, num_classes=len(index.classes))
    loggers.check_loggers(config)
    monitor.check(config)
    if issubclass(model.find_class(config.model.class_path), ImageClassifier):
        check_label_kind(index.label_kind)
        # Tried without allocating weights. A network that reads tensors' values while it is built
        # (torchvision's RegNets, a user's subclass) raises RuntimeErrors there, and only there.
        with contextlib.suppress(RuntimeError), torch.device("meta"):
            model.build(config.model, num_classes=len(index.classes))


@dataclasses.dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a cluster as it stands."""

    cpus: float
    gpus: float
    nodes: tuple[Mapping[str, float], ...] = ()
    """The resources of each node."""


def cluster_resources() -> Resources:
    """Return what the connected Ray cluster has."""
    found = ray.cluster_resources()
    nodes = tuple(elastic.usable_nodes().values())
    return Resources(found.get("CPU", 0), found.get("GPU", 0), nodes)


def check_resources(config: Config, found: Resources, *, may_grow: bool) -> None:
    """Hold the workers against the cluster, unless it can add nodes.

    Raises:
        UserError: the workers can never start.
    """
    scaling = config.scaling
    for key, each, available, kind in (
        ("scaling.cpus_per_worker", scaling.cpus_per_worker, found.cpus, "CPUs"),
        ("scaling.gpus_per_worker", scaling.gpus_per_worker, found.gpus, "GPUs"),
    ):
        needed, value = scaling.min_workers * each, each
        if needed > available and not may_grow:
            if each <= available:
                key, value = "scaling.num_workers", scaling.min_workers
            raise UserError(
                f"{key}={value:g} needs {needed:g} {kind} but this cluster has {available:g}, so "
                "the workers would wait for ever; lower it or add nodes."
            )
    _check_nodes(scaling, found.nodes, may_grow=may_grow)
    if not may_grow:
        _check_beside(config, found.nodes)


def _check_nodes(
    scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]], *, may_grow: bool
) -> None:
    """Hold single workers against single nodes: none is spread over two."""
    fits = elastic.room({str(i): node for i, node in enumerate(nodes)}, [], scaling)
    if fits >= scaling.min_workers or may_grow or not nodes:
        return
    key, each, kind = "scaling.cpus_per_worker", scaling.cpus_per_worker, "CPU"
    largest = max(node.get(kind, 0) for node in nodes)
    if each <= largest and scaling.gpus_per_worker > 0:
        key, each, kind = "scaling.gpus_per_worker", scaling.gpus_per_worker, "GPU"
        largest = max(node.get(kind, 0) for node in nodes)
    raise UserError(
        f"{key}={each:g}: the {len(nodes)} nodes of this cluster hold {fits} workers, fewer than "
        f"scaling.num_workers={scaling.min_workers}, the largest having {largest:g} {kind}s; lower "
        "one of the two."
    )


def _check_beside(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """Look for a node that holds the process that validates, and leaves room for the workers."""
    beside, scaling = config.train.validate.beside, config.scaling
    if beside is None or not nodes:
        return
    own = {"CPU": beside.cpus, "GPU": beside.gpus}
    named = {str(i): node for i, node in enumerate(nodes)}
    for name, node in named.items():
        place = elastic.Group("validation", ((name, own),))
        fits = all(node.get(kind, 0) >= amount for kind, amount in own.items())
        if fits and elastic.room(named, [place], scaling) >= scaling.min_workers:
            return
    each = f"{scaling.cpus_per_worker:g} CPUs and {scaling.gpus_per_worker:g} GPUs"
    raise UserError(
        f"train.validate.beside={{cpus: {beside.cpus:g}, gpus: {beside.gpus:g}}} finds no place on "
        f"any of this cluster's {len(nodes)} nodes beside {scaling.min_workers} workers of {each} "
        "each; lower one of the two, add nodes, or set train.validate.beside to null."
    )


def describe_waiting(config: Config, found: Resources) -> str | None:
    """Return what to say where the cluster does not hold the workers yet, else None."""
    try:
        check_resources(config, found, may_grow=False)
    except UserError as error:
        return f"waiting for the cluster to grow: {error}"
    return None


def is_finished(config: Config, run: str) -> bool:
    """Return whether a run is trained and no validation beside it is out any more."""
    return is_trained(config, run) and not checkpoint.list_manifests(run)[-1].pending


def is_trained(config: Config, run: str) -> bool:
    """Return whether the run's newest checkpoint is its end, under this config."""
    manifests = checkpoint.list_manifests(run)
    if not manifests or not manifests[-1].done:
        return False
    last = manifests[-1]
    return last.done != "max_epochs" or last.epoch >= config.train.max_epochs
