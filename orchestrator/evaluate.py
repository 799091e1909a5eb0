"""Metrics of a checkpoint without gradients, over every image of a split exactly once."""

import contextlib
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import ray
import torch
from torch.nn import functional

from orchestrator import cluster, storage
from orchestrator.config import Config, TrainConfig, UserError
from orchestrator.data import feeds
from orchestrator.data.device import ToDevice
from orchestrator.data.index import Index
from orchestrator.data.loader import Loader, Opened
from orchestrator.data.source import Placement, blocks_of, plan_segment, split_segment
from orchestrator.data.sources import read_data, verify_data
from orchestrator.run import EVALUATION_FILE, read_config
from orchestrator.train import model, preflight
from orchestrator.train.saving import checkpoint
from orchestrator.train.strategies.precision import lightning_precision
from orchestrator.train.strategies.tensors import read_weights

Which = Literal["best", "last"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    run: str
    config: Config
    manifest: checkpoint.Manifest
    split: str
    placement: Placement
    import_paths: list[str]


def evaluate(
    run: str, *, which: Which = "best", split: str = "val", verbose: bool = False
) -> dict[str, Any]:
    """Evaluate a run's checkpoint on one worker and write `evaluation.json`.

    Returns:
        What that file holds: split, checkpoint, step, samples, unreadable, accuracy, loss (mean
        cross-entropy), images_per_s, precision, batch, and a row for each class.

    Raises:
        UserError: there is no such run, checkpoint or split.
    """
    run = storage.absolute(run)
    config = read_config(run)
    index = read_data(config.data)
    manifest = _choose(run, config, which)
    _check(config, index, manifest, split)
    cluster.connect(verbose=verbose)
    scaling = dataclasses.replace(config.scaling, num_workers=1)
    preflight.check_resources(
        dataclasses.replace(config, scaling=scaling, train=TrainConfig()),
        preflight.cluster_resources(),
        may_grow=cluster.may_grow(),
    )
    cpus = ray.cluster_resources().get("CPU", 0)
    job = _Job(
        run=run,
        config=config,
        manifest=manifest,
        split=split,
        placement=Placement.choose(
            requested=None, cluster_cpus=cpus, worker_cpus=scaling.cpus_per_worker
        ),
        import_paths=cluster.import_paths(),
    )
    worker = ray.remote(_evaluate_on_worker).options(
        num_cpus=scaling.cpus_per_worker, num_gpus=scaling.gpus_per_worker
    )
    with cluster.user_errors():
        found: dict[str, Any] = ray.get(worker.remote(job))
    evaluation = {"checkpoint": which, **found}
    content = json.dumps(evaluation, indent=1).encode()
    storage.write_atomic(storage.join(run, EVALUATION_FILE), content)
    return evaluation


def _choose(run: str, config: Config, which: Which) -> checkpoint.Manifest:
    manifests = checkpoint.list_manifests(run)
    if not manifests:
        raise UserError(f"{run} holds no committed checkpoint yet; train it first.")
    monitor, mode = checkpoint.monitored(config.train.early_stopping)
    best = checkpoint.best_of(manifests, monitor=monitor, mode=mode)
    return best if which == "best" and best else manifests[-1]


def _check(config: Config, index: Index, manifest: checkpoint.Manifest, split: str) -> None:
    if index.label_kind != "class":
        raise UserError(
            f"{index.uri} has labels of kind {index.label_kind!r} but accuracy needs one class a "
            "sample; use what the module's validation_step logs."
        )
    if split not in index.splits:
        raise UserError(
            f"--split={split!r}: {index.uri} has only {', '.join(index.splits)}; choose one, or "
            "pack with --test-fraction."
        )
    verify_data(config.data)
    if index.digest != manifest.index_digest:
        raise UserError(
            f"{index.uri} has the digest {index.digest[:12]} but the run was trained on "
            f"{manifest.index_digest[:12]}; restore the data set that it was trained on."
        )


def _evaluate_on_worker(job: _Job) -> dict[str, Any]:
    cluster.extend_imports(job.import_paths)
    device = torch.device("cuda" if job.config.scaling.gpus_per_worker else "cpu")
    index = read_data(job.config.data)
    module = model.build(job.config.model, num_classes=len(index.classes))
    with tempfile.TemporaryDirectory(prefix="orchestrator-evaluate-") as folder:
        checkpoint.fetch(job.run, job.manifest, Path(folder))
        module.load_state_dict(read_weights(Path(folder)))
    module.to(device, memory_format=torch.channels_last).eval()
    loader = _loader(job, index, device)
    return {
        "split": job.split,
        "step": job.manifest.step,
        "precision": job.manifest.precision,
        "batch": job.config.data.eval_batch,
        **_measure(module, loader, index, job.manifest.precision, device),
    }


def _loader(job: _Job, index: Index, device: torch.device) -> Loader:
    feed = feeds.evaluation_feed(job.config, index, split=job.split, passes=1, num_workers=1)

    def open_segment(step: int) -> Opened:
        segment = plan_segment(feed, job.placement, step)
        (iterator,) = split_segment(feed, job.placement, segment)
        return Opened(blocks_of(iterator), segment.stop_step, segment.open_next_at)

    return Loader(
        feed.batching,
        rank=0,
        step=0,
        open_segment=open_segment,
        to_device=ToDevice(device, job.config.data, num_classes=len(index.classes)),
        image_size=job.config.data.image_size,
    )


def _measure(
    module: pl.LightningModule,
    loader: Loader,
    index: Index,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    num_classes = len(index.classes)
    totals = torch.zeros(num_classes, dtype=torch.int64)
    correct = torch.zeros(num_classes, dtype=torch.int64)
    loss, unreadable = 0.0, 0
    began = time.perf_counter()
    with torch.inference_mode(), _autocast(precision, device):
        for batch in loader.take(1):
            assert loader.current is not None
            unreadable += len(loader.current.batch.bad)
            if loader.current.loss_samples == 0:
                continue
            labels, logits = batch["label"], _logits(module, batch["image"], num_classes)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            hits = labels[logits.argmax(1) == labels]
            totals += torch.bincount(labels.cpu(), minlength=num_classes)
            correct += torch.bincount(hits.cpu(), minlength=num_classes)
    elapsed = time.perf_counter() - began
    samples = int(totals.sum())
    assert samples + unreadable == loader.batching.total
    return {
        "samples": samples,
        "unreadable": unreadable,
        "accuracy": int(correct.sum()) / max(samples, 1),
        "loss": loss / max(samples, 1),
        "images_per_s": samples / elapsed,
        "classes": [
            {"name": name, "samples": n, "correct": k, "accuracy": k / n if n else None}
            for name, n, k in zip(index.classes, totals.tolist(), correct.tolist(), strict=True)
        ],
    }


def _logits(module: pl.LightningModule, image: torch.Tensor, num_classes: int) -> torch.Tensor:
    logits = module(image)
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(image), num_classes):
        raise UserError(
            f"{type(module).__name__}.forward(image) must return logits of shape (batch, "
            f"{num_classes}) to be evaluated; return them there."
        )
    return logits.float()


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if lightning_precision(precision) == "32-true":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
