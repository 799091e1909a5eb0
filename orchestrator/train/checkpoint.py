"""When a checkpoint counts: written file by file, committed by a manifest written last. No Ray.

`checkpoints/step-<n>/` counts if its `MANIFEST.json` exists; every file in it is listed there with
size and SHA-256. Which one is latest and which is best is read off the manifests, so that no
pointer can be torn.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from orchestrator import storage
from orchestrator.config import EarlyStoppingConfig, UserError

MANIFEST_FILE = "MANIFEST.json"
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign or missing."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What makes a folder a checkpoint."""

    step: int
    """Optimizer steps that were committed before it."""
    position: int
    """Samples of the stream that these steps consumed: the whole data state."""
    epoch: int
    """Epochs completed."""
    metrics: dict[str, float]
    """Validation metrics; empty where it was taken inside an epoch."""
    done: str
    """Why the run ended here ("converged", "max_epochs" or "diverged"), or empty."""
    world_size: int
    strategy: str
    precision: str
    config_digest: str
    index_digest: str
    stats: dict[str, float]
    """Totals since the run's first step: train_s, wait_s (seconds), bad (images)."""
    files: tuple[FileRecord, ...]


def checkpoint_uri(run: str, step: int) -> str:
    """Return the folder of a step's checkpoint."""
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def store_files(folder: Path, uri: str) -> list[FileRecord]:
    """Upload all files below a local folder and return their records."""
    records = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        storage.upload(path, storage.join(uri, name))
        records.append(FileRecord(name, path.stat().st_size, _sha256(path)))
    return records


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit(run: str, manifest: Manifest) -> None:
    """Make a checkpoint count: all its files are stored by now."""
    content = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1)
    location = storage.join(checkpoint_uri(run, manifest.step), MANIFEST_FILE)
    storage.write_atomic(location, content.encode())


def list_manifests(run: str) -> list[Manifest]:
    """Return the manifests of all committed checkpoints, oldest first."""
    folder = storage.join(run, "checkpoints")
    manifests = []
    for entry in storage.list_folder(folder):
        location = storage.join(folder, entry.name, MANIFEST_FILE)
        if entry.is_folder and storage.exists(location):
            manifests.append(_parse(location, storage.read_bytes(location)))
    return sorted(manifests, key=lambda manifest: manifest.step)


def _parse(location: str, content: bytes) -> Manifest:
    try:
        fields = json.loads(content)
        if fields.pop("format") != FORMAT:
            raise CheckpointError(
                f"{location} has another format than {FORMAT}; use the version "
                "of orchestrator that wrote it."
            )
        files = tuple(FileRecord(**record) for record in fields.pop("files"))
        return Manifest(files=files, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{location} is damaged ({error!r}); delete its folder to go on from the one before."
        ) from error


def best_of(manifests: Iterable[Manifest], *, monitor: str, mode: str) -> Manifest | None:
    """Return the checkpoint with the best finite `monitor`, the earlier one of equals."""
    sign = 1 if mode == "min" else -1
    scored = [m for m in manifests if math.isfinite(m.metrics.get(monitor, math.nan))]
    return min(scored, key=lambda m: (sign * m.metrics[monitor], m.step), default=None)


def monitored(stopping: EarlyStoppingConfig | None) -> tuple[str, str]:
    """Return the metric and mode that say which checkpoint is best."""
    stopping = stopping or EarlyStoppingConfig()
    return stopping.monitor, stopping.mode


def prune(run: str, *, keep: int, best: Manifest | None) -> None:
    """Delete all but the `keep` latest checkpoints and the best one."""
    manifests = list_manifests(run)
    kept = {manifest.step for manifest in manifests[-keep:]} | ({best.step} if best else set())
    for manifest in manifests:
        if manifest.step not in kept:
            delete(run, manifest.step)


def delete(run: str, step: int) -> None:
    """Delete a checkpoint, its manifest first: what is left half deleted does not count."""
    uri = checkpoint_uri(run, step)
    storage.delete_file(storage.join(uri, MANIFEST_FILE))
    storage.delete_folder(uri)


def rewind(run: str, step: int) -> None:
    """Delete what lies beyond `step` (a kill or damage left it) and what was never committed."""
    for subfolder in ("checkpoints", "samples"):
        folder = storage.join(run, subfolder)
        for entry in list(storage.list_folder(folder)):
            location = storage.join(folder, entry.name)
            committed = subfolder == "samples" or storage.exists(
                storage.join(location, MANIFEST_FILE)
            )
            number = entry.name.removeprefix("step-")
            if not number.isdecimal():
                continue  # not ours
            if int(number) > step or not committed:
                storage.delete_folder(location)


def fetch(run: str, manifest: Manifest, target: Path) -> None:
    """Copy a checkpoint's files to a local folder and compare their checksums.

    Raises:
        CheckpointError: a file is missing or differs from the manifest.
    """
    uri = checkpoint_uri(run, manifest.step)
    for record in manifest.files:
        path = target / record.name
        location = storage.join(uri, record.name)
        if storage.size(location) != record.size:
            raise CheckpointError(f"{location} is missing or not {record.size} bytes long.")
        storage.download(location, path)
        if _sha256(path) != record.sha256:
            raise CheckpointError(f"{location} does not have the checksum of its manifest.")


def fetch_newest(run: str, manifests: list[Manifest], target: Path) -> tuple[Manifest, list[str]]:
    """Fetch the newest undamaged checkpoint; return it and what was wrong with newer ones.

    Raises:
        CheckpointError: all are damaged.
    """
    problems: list[str] = []
    for manifest in reversed(manifests):
        try:
            fetch(run, manifest, target)
            return manifest, problems
        except CheckpointError as error:
            problems.append(str(error))
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
    raise CheckpointError(
        f"no checkpoint of {run} is whole ({problems[0]}); restore one, or take another --name."
    )
