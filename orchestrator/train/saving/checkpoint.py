"""When a checkpoint counts: written file by file, committed by a manifest written last. No Ray.

`checkpoints/step-<n>/` counts if its `MANIFEST.json` exists and matches its own checksum; every
file of it is listed there with size and SHA-256. Which one is latest and which is best is read off
the manifests, so that no pointer can be torn.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator import storage
from orchestrator.config import EarlyStoppingConfig, UserError

MANIFEST_FILE = "MANIFEST.json"
FORMAT = 2


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
    """Totals since the run's first step: train_s, wait_s (seconds), bad (images), and so on."""
    files: tuple[FileRecord, ...]
    stopping: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What early stopping has seen so far; see train/validation/stopping.py."""
    pending: tuple[int, ...] = ()
    """Steps of checkpoints whose validation beside training had no result yet."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What makes the run this run, see `overrides.identity`; empty where an older version wrote."""


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
    """Make a checkpoint count: all its files are stored by now.

    Raises:
        CheckpointError: its step has one already, which its files may no longer match.
    """
    location = _manifest_uri(run, manifest.step)
    if not storage.create(location, _encode(manifest)):
        raise CheckpointError(f"{location} is there already; another start has committed it.")


def _encode(manifest: Manifest) -> bytes:
    fields = {"format": FORMAT, **dataclasses.asdict(manifest)}
    return json.dumps({**fields, "sha256": _digest(fields)}, indent=1).encode()


def _manifest_uri(run: str, step: int) -> str:
    return storage.join(checkpoint_uri(run, step), MANIFEST_FILE)


def amend(run: str, step: int, **changes: Any) -> None:
    """Write a committed checkpoint's manifest again with what is known by now; files stay.

    Raises:
        CheckpointError: it is damaged.
        storage.MissingError: it was deleted meanwhile.
    """
    changed = dataclasses.replace(read_manifest(run, step), **changes)
    storage.write_atomic(_manifest_uri(run, step), _encode(changed))


def read_manifest(run: str, step: int) -> Manifest:
    """Return the manifest of a committed checkpoint.

    Raises:
        CheckpointError: it is damaged.
        storage.MissingError: there is none.
    """
    location = _manifest_uri(run, step)
    return _parse(location, storage.read_bytes(location), step)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Found:
    """What the checkpoints folder of a run holds."""

    manifests: tuple[Manifest, ...]
    """Of the committed checkpoints, oldest first."""
    problems: tuple[str, ...]
    """A sentence for each manifest that is damaged."""


def survey(run: str) -> Found:
    """Read all manifests of a run.

    Raises:
        CheckpointError: one was written by another version, or there are only damaged ones:
            nothing ever starts from scratch where there was a checkpoint.
    """
    manifests, problems = [], []
    for step in steps_of(run):
        try:
            manifests.append(read_manifest(run, step))
        except storage.MissingError:
            continue  # never committed, or pruned a moment ago
        except _DamagedError as error:
            problems.append(str(error))
    if problems and not manifests:
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({problems[0]}); restore one, or take another --name."
        )
    return Found(tuple(manifests), tuple(problems))


def list_manifests(run: str) -> list[Manifest]:
    """Return the manifests of all committed checkpoints, oldest first; damaged ones are left out.

    Raises:
        CheckpointError: as `survey` does.
    """
    return list(survey(run).manifests)


def steps_of(run: str) -> list[int]:
    """Return the steps of all checkpoints, committed or not, in order."""
    folder = storage.join(run, "checkpoints")
    steps = [step_of(entry.name) for entry in storage.list_folder(folder) if entry.is_folder]
    return sorted(step for step in steps if step is not None)


def step_of(name: str) -> int | None:
    """Return the step that a folder is named after, or None."""
    number = name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


class _DamagedError(CheckpointError):
    """A manifest that is torn or was altered."""


def _parse(location: str, content: bytes, step: int) -> Manifest:
    try:
        fields = json.loads(content)
        whole = fields.pop("sha256", None) == _digest(fields)
        if fields["format"] != FORMAT and (whole or fields["format"] == 1):
            raise CheckpointError(
                f"{location} has format {fields['format']}, not {FORMAT}; use the version of "
                "orchestrator that wrote it, or another --name."
            )
        if not whole:
            raise ValueError("it does not have its own checksum")
        if fields["step"] != step:
            raise ValueError(f"it is the manifest of step {fields['step']}")
        del fields["format"]
        fields["pending"] = tuple(fields.get("pending", ()))
        files = tuple(FileRecord(**record) for record in fields.pop("files"))
        return Manifest(files=files, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _DamagedError(f"{location} is damaged: {error}") from error


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
    """Delete what is older than the latest checkpoint, but the `keep` latest and the best one.

    What was never committed, or whose manifest is damaged, goes too; a save that is under way has a
    later step.
    """
    manifests = list_manifests(run)
    if not manifests:
        return
    kept = {manifest.step for manifest in manifests[-keep:]} | ({best.step} if best else set())
    # A resume from one of these asks for the validations that it still waited for.
    kept |= {step for manifest in manifests if manifest.step in kept for step in manifest.pending}
    for step in steps_of(run):
        if step < manifests[-1].step and step not in kept:
            delete(run, step)


def delete(run: str, step: int) -> None:
    """Delete a checkpoint, its manifest first: what is left half deleted does not count."""
    storage.delete_file(_manifest_uri(run, step))
    storage.delete_folder(checkpoint_uri(run, step))


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


def fetch_newest(
    run: str, manifests: Sequence[Manifest], target: Path
) -> tuple[Manifest, list[str]]:
    """Fetch the newest undamaged checkpoint; return it and what was wrong with newer ones.

    Raises:
        CheckpointError: all are damaged.
    """
    problems: list[str] = []
    for manifest in reversed(manifests):
        try:
            fetch(run, manifest, target)
            return manifest, problems
        except (CheckpointError, storage.MissingError) as error:
            problems.append(str(error))
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
    raise CheckpointError(
        f"no checkpoint of {run} is whole ({problems[0]}); restore one, or take another --name."
    )
