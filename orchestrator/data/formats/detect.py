"""Source -> format: looks at names, at most 1,000 of them, then at the first samples."""

import itertools
from collections.abc import Callable, Sequence

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats import foreign, imagefolder, manifest, parquet, webdataset
from orchestrator.data.formats.base import Format, is_hidden
from orchestrator.data.formats.request import Request

FORMATS = ("imagefolder", "webdataset", "parquet", "manifest", "mds", "litdata")
# A page of a bucket.
_LOOKED_AT = 1000
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")


def open_format(
    source: str, request: Request, say: Callable[[str], None], *, classes: Sequence[str] = ()
) -> tuple[str, Format]:
    """Return the name of the source's format, and the format.

    Args:
        source: absolute URI.
        request: what the user said about it.
        say: receives what is left out.
        classes: those that were packed before, which keep their numbers.

    Raises:
        UserError: nothing there can be packed.
    """
    name = request.format or detect(source)
    if name not in FORMATS:
        raise UserError(f"--format {name} is unknown; choose one of {', '.join(FORMATS)}.")
    if name == "imagefolder":
        _check_folder_flags(request)
        return name, imagefolder.open_folder(source, say, known=classes)
    if name == "webdataset":
        return name, webdataset.open_tars(source, request)
    if name == "manifest":
        return name, manifest.open_manifests(source, request)
    if name in ("mds", "litdata"):
        return name, foreign.open_foreign(name, source, request)
    opened = parquet.open_parquet(source, request)
    if opened is not None:
        return name, opened
    if request.format:
        raise UserError(
            f"--source {source} has no column of image bytes (or struct with a field `bytes`); "
            "name it with --image-column, or use --format manifest."
        )
    return "manifest", manifest.open_manifests(source, request)


def detect(source: str) -> str:
    """Return the name of a source's format, by the names of its files.

    Raises:
        UserError: there is no such source.
    """
    if not storage.is_remote(source) and not storage.local_path(source).exists():
        raise UserError(f"--source {source} is no folder; check the path.")
    if by_name := _by_names([source]):
        return by_name
    foreign_name = foreign.recognise(source)
    if foreign_name:
        return foreign_name
    entries = itertools.islice(storage.list_tree(source), _LOOKED_AT)
    names = [entry.name for entry in entries if not is_hidden(entry.name)]
    images = any(name.lower().endswith(imagefolder.IMAGE_SUFFIXES) for name in names)
    return "imagefolder" if images else _by_names(names) or "imagefolder"


def _by_names(names: Sequence[str]) -> str:
    """Return what the names' endings say; img2dataset has a Parquet table beside every tar."""
    lower = [name.lower() for name in names]
    if any(name.endswith((*webdataset.SUFFIXES, *webdataset.COMPRESSED)) for name in lower):
        return "webdataset"
    if any(name.endswith(parquet.SUFFIXES) for name in lower):
        return "parquet"
    return "manifest" if any(name.endswith(_TABLES) for name in lower) else ""


def _check_folder_flags(request: Request) -> None:
    flags = {
        "--label-column": request.label_column,
        "--image-column": request.image_column,
        "--id-column": request.id_column,
        "--classes": request.classes,
        "--label-kind": "" if request.label_kind == "class" else request.label_kind,
    }
    for flag, value in flags.items():
        if value:
            raise UserError(
                f"{flag} has no meaning for folders <class>/<image>, whose folders are the labels; "
                "leave it out, or name another --format."
            )
