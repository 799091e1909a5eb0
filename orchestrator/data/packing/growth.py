"""A data set that is packed again: what it was packed with, and what has changed since."""

import dataclasses
from collections.abc import Callable
from typing import Any

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.base import Format
from orchestrator.data.formats.imagefolder import ImageFolder
from orchestrator.data.formats.request import Request
from orchestrator.data.index import Index, read_index
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.units import Listed


@dataclasses.dataclass(frozen=True)
class Before:
    """The data set that an earlier pack wrote."""

    index: Index
    request: Request
    generation: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Its classes, which keep their numbers."""
        return self.index.classes

    @property
    def in_place(self) -> bool:
        """Whether it names files that lie elsewhere."""
        return bool(self.index.settings["in_place"])

    def continued(self, name: str, source: Format) -> Format:
        """Return the source as it was read before.

        Raises:
            UserError: it is another kind of source now.
        """
        settings = self.index.settings
        if name != settings["format"]:
            raise UserError(
                f"--source {settings['source']} was packed as {settings['format']} but looks like "
                f"{name} now; say --format {settings['format']}, or choose another --out."
            )
        if isinstance(source, ImageFolder):
            return dataclasses.replace(source, cuts=tuple(map(tuple, settings["cuts"])))
        labels = dataclasses.replace(source.labels, **settings["labels"])
        if labels.fixed and labels.classes[: len(self.classes)] != self.classes:
            raise UserError(
                f"the classes of --source {settings['source']} begin otherwise than those of "
                f"{self.index.uri}, so labels would change; choose another --out."
            )
        return source.with_labels(labels)

    def holds(self, samples_of_split: dict[str, int], quarantined: int) -> bool:
        """Return whether these are just the samples that were packed before."""
        splits = {name: split.samples for name, split in self.index.splits.items()}
        return samples_of_split == splits and quarantined == self.index.quarantined


def read_before(out: str, settings: PackSettings, request: Request) -> Before:
    """Read what was packed and check that it may be continued.

    Raises:
        UserError: it was packed from elsewhere, or with other settings.
    """
    index = read_index(out)
    settings.check_same(index.settings, out)
    stored: dict[str, Any] = index.settings["request"]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    labels = index.settings["labels"]
    found_out = {
        "format": index.settings["format"],
        "label_kind": labels["kind"],
        "label_column": labels["column"],
    }
    for key, value in dataclasses.asdict(request).items():
        # What is not said again stays; classes and prefixes may be added to.
        before = fields[key] or found_out.get(key)
        if value and value != before and key not in ("classes", "allow"):
            raise UserError(
                f"--out {out} was packed with {key} {before or 'found out'!r}, not {value!r}; "
                "choose another --out, or delete it first."
            )
        if value and key in ("classes", "allow"):
            fields[key] = value
    return Before(index, Request(**fields), int(index.settings["generation"]))


def say_changes(listed: Listed, say: Callable[[str], None], *, in_place: bool = False) -> None:
    """Say what of the packed source is no longer as it was packed."""
    kept = "what was packed of them stays (another --out drops it)"
    if in_place:  # nothing was copied, so nothing is kept
        kept = "the index names the files as they are now"
    if listed.changed or listed.gone:
        say(
            f"the source changed since it was packed: {listed.changed:,} items are others now and "
            f"{listed.gone:,} are gone; {kept}"
        )


def delete_unused_markers(out: str, parts: int) -> None:
    """Delete markers of listers that no longer exist: of an interrupted pack of another source."""
    units = storage.join(out, "units")
    for entry in list(storage.list_folder(units)):
        if entry.is_folder and entry.name.isdigit() and int(entry.name) >= parts:
            storage.delete_folder(storage.join(units, entry.name))
