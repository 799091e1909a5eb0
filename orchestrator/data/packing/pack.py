"""Driver side: images in any layout -> Parquet shards and an index, written last.

A second pack of a grown source adds shards and keeps what is there; Parquet that is in good shape
is indexed where it lies.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import ray

from orchestrator import cluster, storage
from orchestrator.config import UserError
from orchestrator.data.formats import imagefolder
from orchestrator.data.formats.base import Format, Survey
from orchestrator.data.formats.detect import open_format
from orchestrator.data.formats.labels import MAX_CLASSES
from orchestrator.data.formats.parquet import ParquetRows
from orchestrator.data.formats.request import Request
from orchestrator.data.index import INDEX_FILE, Index, write_index
from orchestrator.data.packing import growth, inplace_index
from orchestrator.data.packing.growth import Before
from orchestrator.data.packing.job import Job
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.tally import QUARANTINE_FILE as QUARANTINE_FILE
from orchestrator.data.packing.tally import Tally, said_bad, summary, write_quarantine

_Say = Callable[[str], None]


def pack(
    source: str,
    out: str,
    *,
    request: Request | None = None,
    say: _Say,
    verbose: bool = False,
    **settings: Any,
) -> Index:
    """Pack `source` into `out` and return the index.

    A pack that was killed is finished; a pack of a grown source packs the growth.

    Args:
        source: where the images are.
        out: the packed folder.
        request: what the user says about the source; None: all is found out.
        say: receives lines for a person.
        verbose: show Ray's log lines.
        settings: the fields of `PackSettings`.

    Raises:
        UserError: the source, the target or a setting does not allow it.
    """
    chosen = PackSettings(source=storage.absolute(source), **settings)
    chosen.check()
    out = storage.absolute(out)
    before = _before(out, chosen, request or Request())
    asked = before.request if before else request or Request()
    name, found = open_format(chosen.source, asked, say, classes=before.classes if before else ())
    if before:
        found = before.continued(name, found)
    storage.check_writable(out)
    cluster.connect(verbose=verbose)
    if before is None and isinstance(found, imagefolder.ImageFolder):
        found = imagefolder.with_cuts(found)
    job = Job(found, out, before.generation + 1 if before else 0, chosen)
    survey = job.survey() if found.needs_survey else Survey()
    job = dataclasses.replace(job, source=_with_names(found, survey, before))
    record = _record(name, job, asked)
    if inplace_index.decide(job, survey, before, say):
        assert isinstance(job.source, ParquetRows)
        return inplace_index.write(job, job.source, survey, before, record, say)
    return _pack(job, survey, before, record, say)


def _before(out: str, settings: PackSettings, request: Request) -> Before | None:
    if f"{out}/".startswith(f"{settings.source}/"):
        raise UserError(
            f"--out {out} lies in --source {settings.source}, where shards would be taken for "
            "images; choose a folder outside."
        )
    if not storage.exists(storage.join(out, INDEX_FILE)):
        return None
    return growth.read_before(out, settings, request)


def _with_names(source: Format, survey: Survey, before: Before | None) -> Format:
    """Return the source with the class names that the survey found, new ones after known ones."""
    labels = source.labels
    if not labels.named or labels.fixed:
        return source
    if len(survey.names) > MAX_CLASSES:
        raise UserError(
            f"--label-column {labels.column} holds {len(survey.names):,} different texts, which "
            "are no classes; name another column, or use --label-kind none."
        )
    known = before.classes if before else ()
    classes = (*known, *sorted(survey.names - set(known)))
    return source.with_labels(dataclasses.replace(labels, classes=classes))


def _record(name: str, job: Job, request: Request) -> dict[str, Any]:
    """Return what the index says about how it was packed."""
    labels = job.source.labels
    record = {
        **job.settings.content(),
        "format": name,
        "request": dataclasses.asdict(request),
        "labels": {"kind": labels.kind, "column": labels.column, "named": labels.named},
        "cuts": getattr(job.source, "cuts", ()),
        "generation": job.generation,
        "in_place": False,
    }
    content: dict[str, Any] = json.loads(json.dumps(record))  # as it is read again
    return content


def _pack(
    job: Job, survey: Survey, before: Before | None, record: dict[str, Any], say: _Say
) -> Index:
    tally = Tally()
    tally.weight = 0 if before else survey.weight
    weighing = [] if tally.weight else job.start_weighing()
    try:
        for found in job.pack():
            tally.add(found)
            if weighing and not tally.weight:
                tally.weight = _weight(weighing)
            tally.say_progress(say)
    finally:
        for task in weighing:
            ray.cancel(task)
    growth.say_changes(tally.listed, say)
    classes = _classes(job, tally, before)
    tally.check(job.settings, classes, folders=isinstance(job.source, imagefolder.ImageFolder))
    if before and before.holds(dict(tally.splits), tally.bad.count):
        say(f"{job.out} is packed already ({summary(before.index)}); nothing to do")
        return before.index
    growth.delete_unused_markers(job.out, job.source.parts)
    bad = tally.bad.table()
    write_quarantine(job.out, bad)
    index = write_index(
        job.out,
        classes=classes,
        shards=tally.shards,
        settings=record,
        quarantined=bad.num_rows,
        label_kind=job.source.labels.kind,
        class_samples=[tally.train_of_label[label] for label in range(len(classes))],
    )
    _say_packed(index, tally, job.settings, say)
    return index


def _weight(weighing: "list[ray.ObjectRef[int]]") -> int:
    """Return the weight of all items, or 0 while it is not known."""
    done, rest = ray.wait(weighing, num_returns=len(weighing), timeout=0)
    try:
        return 0 if rest else sum(ray.get(done))
    except ray.exceptions.RayError:  # then no time that is left is said; packing goes on
        return 0


def _classes(job: Job, tally: Tally, before: Before | None) -> tuple[str, ...]:
    """Return class names by number; numbers without names are their own."""
    labels = job.source.labels
    if labels.kind not in ("class", "multi"):
        return ()
    if labels.named or labels.fixed:
        return labels.classes
    known = before.classes if before else ()
    count = max(max(tally.images_of_label, default=-1) + 1, len(known))
    if count > MAX_CLASSES:
        raise UserError(
            f"--label-column {labels.column} goes up to {count - 1:,}, which is no class number; "
            "name another column, or use --label-kind float."
        )
    return (*known, *(str(number) for number in range(len(known), count)))


def _say_packed(index: Index, tally: Tally, settings: PackSettings, say: _Say) -> None:
    if settings.max_side or settings.quality:
        before, after = tally.recoded
        saved = 1 - after / before if before else 0.0
        say(
            f"encoding again made {before / 1e6:,.1f} MB of images {after / 1e6:,.1f} MB: "
            f"{saved:.0%} saved"
        )
    say(f"packed {index.uri}: {summary(index)}")
    for line in said_bad(tally.bad.table()):
        say(line)
