"""What the user asked for about layout and labels, and how first samples complete it."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.labels import BadLabel, Labels, infer, is_named
from orchestrator.data.index import LabelKind

# Taken for the label where nothing was said, the first that is there.
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "target")


@dataclasses.dataclass(frozen=True)
class Request:
    """Flags of `orchestrator pack` that say what the source is; empty means: find out."""

    format: str = ""
    """imagefolder, webdataset, parquet, manifest, mds or litdata."""
    label_kind: LabelKind | None = None
    label_column: str = ""
    image_column: str = ""
    id_column: str = ""
    classes: tuple[str, ...] = ()
    """Class names by number."""
    allow: tuple[str, ...] = ()
    """Prefixes that a manifest may name; empty: the manifest's own folder."""

    def column(self, name: str, columns: Sequence[str], usual: Sequence[str]) -> str:
        """Return the column that the user named, or the first usual one, or nothing.

        Args:
            name: label, image or id.
            columns: those of the source.
            usual: names to look for, the best first.

        Raises:
            UserError: the user's column is not there.
        """
        asked: str = getattr(self, f"{name}_column")
        if not asked:
            return next((column for column in usual if column in columns), "")
        if asked.partition(".")[0] not in columns:
            raise UserError(
                f"--{name}-column {asked} is no column of the source; it has "
                f"{', '.join(columns) or 'none'}."
            )
        return asked

    def labels(self, column: str, values: Iterable[object], names: Sequence[str] = ()) -> Labels:
        """Return how labels are read, given those of some samples.

        Args:
            column: where labels lie; empty: nowhere.
            values: raw labels.
            names: class names that the source itself gives to its numbers.

        Raises:
            UserError: a kind was asked for, but there are no labels, or they do not fit it.
        """
        found = list(values)
        classes = self.classes or tuple(names)
        if self.label_kind == "none":
            return Labels("none")
        if not column:
            if self.label_kind is not None:
                raise UserError(
                    f"--label-kind {self.label_kind} needs labels, but none were found; name them "
                    "with --label-column, or use --label-kind none."
                )
            return Labels("none")
        kind, named = infer(found, classes=classes)
        if self.label_kind is not None and self.label_kind != kind:
            kind = self.label_kind
            try:
                named = is_named(kind, found, classes)
            except BadLabel as error:
                raise UserError(
                    f"--label-kind {kind} does not fit column {column!r} ({error}); name another "
                    "kind, or another column with --label-column."
                ) from error
        if kind == "none":
            return Labels("none")
        known = classes if kind in ("class", "multi") else ()
        return Labels(kind, column, named, known, fixed=bool(known))


def read_classes(uri: str) -> tuple[str, ...]:
    """Read a file with one class name a line.

    Raises:
        UserError: it is empty, not UTF-8, or names a class twice.
    """
    try:
        lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {uri} is not UTF-8 ({error}); write it again.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice or not names:
        what = f"names {twice[0]!a} twice" if twice else "is empty"
        raise UserError(f"--classes {uri} {what}; write each class once, on its own line.")
    return names
