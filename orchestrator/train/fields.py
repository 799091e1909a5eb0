"""Driver side: the fields of a config, held against their rules. No torch, no Ray, no storage."""

import math
from typing import Any

from orchestrator.config import Config, UserError


def check_config(config: Config) -> None:
    """Check what needs neither storage nor Ray.

    Raises:
        UserError: a field's value cannot work.
    """
    data, train, scaling = config.data, config.train, config.scaling
    stopping, apart = train.early_stopping, train.validate.beside
    inside = ".." not in config.name.split("/") and not config.name.startswith("/")
    rule = "must be a folder name; choose one such as my-run"
    require("name", config.name, config.name and inside, rule)
    rule = "must name what `orchestrator pack --out` wrote"
    require("data.index", data.index, data.index or data.mix, rule)
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
        require(key, value, value is None or value >= 1, "must be at least 1; raise it")
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
        require(key, number, number is None or number > 0, "must be above 0; raise it")
    most = train.max_failures
    require("train.max_failures", most, most >= 0, "must be at least 0; raise it")
    delta, limit = (stopping.min_delta, stopping.divergence_threshold) if stopping else (0, None)
    rule = "must be a number from 0 on; raise it"
    require("train.early_stopping.min_delta", delta, 0 <= delta < math.inf, rule)
    rule = "must be a number, or null; change it"
    is_number = limit is None or not math.isnan(limit)
    require("train.early_stopping.divergence_threshold", limit, is_number, rule)
    gpus = scaling.gpus_per_worker
    require("scaling.gpus_per_worker", gpus, gpus >= 0, "must be at least 0; raise it")
    gpus = train.validate.gpus
    require("train.validate.beside.gpus", gpus, gpus >= 0, "must be at least 0; raise it")
    rule = "must be from 0 to 4294967295; choose such a number"
    require("seed", config.seed, 0 <= config.seed < 2**32, rule)
    low, high = data.crop_scale
    rule = "must be two ascending shares above 0 and up to 1, e.g. [0.08, 1.0]"
    require("data.crop_scale", [low, high], 0 < low <= high <= 1, rule)
    low, high = data.crop_ratio
    rule = "must be two ascending numbers above 0, e.g. [0.75, 1.3333]"
    require("data.crop_ratio", [low, high], 0 < low <= high, rule)
    require("data.flip", data.flip, 0 <= data.flip <= 1, "must be a probability, from 0 to 1")
    share = data.max_bad_fraction
    require("data.max_bad_fraction", share, 0 <= share <= 1, "must be a share, from 0 to 1")
    rule = "must be a share above 0 and up to 1, e.g. 0.875"
    require("data.eval_crop", data.eval_crop, 0 < data.eval_crop <= 1, rule)
    require("data.std", list(data.std), min(data.std) > 0, "must be above 0, e.g. 0.225 each")
    workers = scaling.max_workers
    rule = f"must be at least scaling.num_workers={workers}; raise it or lower that"
    enough = data.global_batch >= workers
    require("data.global_batch", data.global_batch, enough, rule)


def require(key: str, value: Any, holds: object, rule: str) -> None:
    """Refuse a field's value that does not hold.

    Raises:
        UserError: the field, its value and the rule.
    """
    if not holds:
        raise UserError(f"{key}={value!r} {rule}.")
