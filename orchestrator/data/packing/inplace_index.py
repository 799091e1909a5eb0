"""Driver side: the index of Parquet files that stay where they are."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.config import UserError
from orchestrator.data.formats import inplace
from orchestrator.data.formats.base import Survey
from orchestrator.data.formats.labels import MAX_CLASSES
from orchestrator.data.formats.parquet import ParquetRows
from orchestrator.data.index import Index, Shard, ShardColumns, read_shards, write_index
from orchestrator.data.packing.growth import Before, say_changes
from orchestrator.data.packing.job import Job
from orchestrator.data.packing.tally import summary
from orchestrator.data.packing.units import Listed

_Say = Callable[[str], None]
_BATCH = 4096


def decide(job: Job, survey: Survey, before: Before | None, say: _Say) -> bool:
    """Return whether the files are indexed where they lie, and say why not.

    Raises:
        UserError: earlier files were, but a new one cannot be.
    """
    settings, files = job.settings, survey.files
    recoded = settings.max_side or settings.quality
    if not isinstance(job.source, ParquetRows) or files is None or settings.copy or recoded:
        return False
    if before is not None and not before.in_place:
        return False
    why = _why_not(job, files, before)
    if why and before is not None:
        raise UserError(
            f"{job.out} indexes Parquet files in place, but {why}; mend the source, or pack "
            "everything into another --out with --copy."
        )
    if why:
        say(f"copying the images, since they cannot be read where they lie: {why}")
    return not why


def _why_not(job: Job, files: pa.Table, before: Before | None) -> str:
    unfit = files.filter(pc.not_equal(files["why_not"], ""))
    if unfit.num_rows:
        return f"{unfit['path'][0]}: {unfit['why_not'][0]}"
    splits = set(_splits(job, files, before))
    for split, share in job.settings.fractions().items():
        if share and split not in splits:
            return f"{files.num_rows} files are too few to give {split!r} one of its own"
    return ""


def _splits(job: Job, files: pa.Table, before: Before | None) -> list[str]:
    known = {shard.path: shard.split for shard in read_shards(before.index)} if before else {}
    paths = files["path"].to_pylist()
    ids = files["id"].to_pylist()
    kept = {name: known[path] for name, path in zip(ids, paths, strict=True) if path in known}
    return inplace.choose_splits(ids, job.settings, job.source.named_splits, kept)


def write(
    job: Job,
    source: ParquetRows,
    survey: Survey,
    before: Before | None,
    record: dict[str, Any],
    say: _Say,
) -> Index:
    """Write an index that names the files, and return it.

    Raises:
        UserError: a label is outside the classes.
    """
    assert survey.files is not None
    files = survey.files.append_column("split", [_splits(job, survey.files, before)])
    say_changes(_changes(files, before), say, in_place=True)
    counts = _label_counts(files, source)
    classes = _classes(source, counts, before)
    shards = ShardColumns()
    for start in range(0, files.num_rows, _BATCH):
        for row in files.slice(start, _BATCH).to_pylist():
            shards.add(_shard(row))
    train = counts["train"]
    index_of = {name: number for number, name in enumerate(classes)}
    numbers = {index_of[name] if source.labels.named else int(name): n for name, n in train.items()}
    index = write_index(
        job.out,
        classes=classes,
        shards=shards,
        settings={**record, "generation": 0, "in_place": True},
        quarantined=0,
        label_kind=source.labels.kind,
        columns=source.columns,
        class_samples=[numbers.get(label, 0) for label in range(len(classes))],
    )
    if before and index.digest == before.index.digest:
        say(f"{job.out} is packed already ({summary(index)}); nothing to do")
    else:
        say(f"indexed {files.num_rows:,} files in place, nothing was copied: {summary(index)}")
    return index


def _shard(row: dict[str, Any]) -> Shard:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Shard)}
    return Shard(**{**fields, "chunk_rows": tuple(row["chunk_rows"])})


def _changes(files: pa.Table, before: Before | None) -> Listed:
    if before is None:
        return Listed(0, 0, 0)
    known = {shard.path: (shard.etag, shard.bytes) for shard in read_shards(before.index)}
    columns = (files[name].to_pylist() for name in ("path", "etag", "bytes"))
    found = {path: (etag, size) for path, etag, size in zip(*columns, strict=True)}
    changed = sum(path in found and found[path] != version for path, version in known.items())
    gone = sum(path not in found for path in known)
    return Listed(len(known) - changed - gone, changed, gone)


def _label_counts(files: pa.Table, source: ParquetRows) -> dict[str, "collections.Counter[str]"]:
    """Return how often each raw label occurs, by split."""
    counts = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    if source.labels.kind in ("class", "multi"):
        for start in range(0, files.num_rows, _BATCH):
            for row in files.slice(start, _BATCH).select(["split", "labels"]).to_pylist():
                for entry in row["labels"]:
                    counts[row["split"]][entry["label"]] += entry["count"]
    return counts


def _classes(
    source: ParquetRows, counts: dict[str, "collections.Counter[str]"], before: Before | None
) -> tuple[str, ...]:
    labels = source.labels
    if labels.kind not in ("class", "multi"):
        return ()
    if labels.named:
        found = {name for split in counts.values() for name in split}
        if found - set(labels.classes):
            raise UserError(
                f"--source {source.source} has the label {sorted(found - set(labels.classes))[0]!a}"
                f", which is none of the {len(labels.classes)} classes; add it to --classes."
            )
        return labels.classes
    largest = max((int(label) for split in counts.values() for label in split), default=-1)
    known = labels.classes if labels.fixed else before.classes if before else ()
    if largest >= (len(known) if labels.fixed else MAX_CLASSES):
        raise UserError(
            f"--source {source.source} has the label {largest} in column {labels.column!r}, "
            f"outside the {len(known) or MAX_CLASSES} classes; mend it, or correct --classes."
        )
    return (*known, *(str(number) for number in range(len(known), largest + 1)))
