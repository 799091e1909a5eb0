"""Which chunks exist: the index of a packed data set, its writing, reading and digest.

A packed folder holds `INDEX.json` (written last: without it there is no data set), a Parquet table
with one row a shard (shard_table.py), and the shards. Everything packed is named relative to the
folder, so a copy of it is the same data set, with the same digest and so the same order of samples.

`INDEX.json` is small whatever the number of images; only the process that plans reads the table.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data import shard_table
from orchestrator.data.places import Chunks, shard_uri
from orchestrator.data.shard_table import Shard as Shard
from orchestrator.data.shard_table import ShardColumns as ShardColumns
from orchestrator.data.shard_table import Split as Split

INDEX_FILE = "INDEX.json"
FORMAT = 2
LabelKind = Literal["class", "multi", "float", "none"]
SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("checksum", pa.uint64()),  # xxh3_64 of the image's bytes
    ]
)
# Shards whose size is compared with the index before a run: enough to notice a data set that was
# overwritten, few enough (64 requests) to cost a second at any scale. Every chunk is checked when
# it is read.
_SAMPLED_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class Index:
    """A packed data set."""

    uri: str
    digest: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    """Totals by name, in the order in which the shard table holds them."""
    settings: dict[str, Any]
    """What it was packed with: source, row group size, fractions."""
    quarantined: int
    """Images left out because they could not be read; the reasons are in `quarantine.parquet`."""
    table: str
    """File name of the shard table."""
    label_kind: LabelKind
    """One class, several, a number, or nothing at all for each image."""
    columns: dict[str, str]
    """What we call a column of the shards -> its name there; `image.bytes` is a struct's field."""
    class_samples: tuple[int, ...]
    """Training samples of each class, or nothing where they were not counted."""


def write_index(
    uri: str,
    *,
    classes: Iterable[str],
    shards: Iterable[Shard] | ShardColumns,
    settings: dict[str, Any],
    quarantined: int,
    label_kind: LabelKind = "class",
    columns: Mapping[str, str] | None = None,
    class_samples: Sequence[int] = (),
) -> Index:
    """Write the shard table, then `INDEX.json`, and return the index.

    Args:
        uri: the packed folder.
        classes: their names, by label.
        shards: in any order; their columns where there are too many for objects.
        settings: what decides that packing again would give the same.
        quarantined: images left out.
        label_kind: what a label is.
        columns: names of the shards' columns; None: those that packing writes.
        class_samples: training samples by label.

    Raises:
        UserError: there is nothing to train on, or a label has no class.
    """
    table = (shards if isinstance(shards, ShardColumns) else ShardColumns(shards)).table()
    class_names = tuple(classes)
    _check(uri, table, class_names, class_samples)
    if columns is None:
        columns = {name: name for name in ("id", "image", "label", "checksum")}
        if label_kind == "none":
            del columns["label"]
    index = Index(
        uri=uri,
        digest="",
        classes=class_names,
        splits=shard_table.totals(table),
        settings=settings,
        quarantined=quarantined,
        table="",
        label_kind=label_kind,
        columns=dict(columns),
        class_samples=tuple(class_samples),
    )
    digest = shard_table.digest(_head(index), [table])
    index = dataclasses.replace(index, digest=digest, table=f"shards-{digest[:16]}.parquet")
    shard_table.write_table(storage.join(uri, index.table), table)
    content = {"format": FORMAT, **dataclasses.asdict(index)}
    del content["uri"]
    storage.write_atomic(storage.join(uri, INDEX_FILE), json.dumps(content, indent=1).encode())
    return index


def _check(
    uri: str, table: pa.Table, classes: tuple[str, ...], class_samples: Sequence[int]
) -> None:
    if not table.num_rows:
        raise UserError(
            f"{uri} would be an index without chunks, since there is no shard; check that the "
            "source holds images."
        )
    if class_samples and len(class_samples) != len(classes):
        raise UserError(
            f"the labels of {uri} go up to {len(class_samples) - 1} but there are only "
            f"{len(classes)} class names; name them all, or correct the labels."
        )


def _head(index: Index) -> str:
    """Return what decides training besides the shards."""
    columns = sorted(index.columns.items())
    return json.dumps([FORMAT, index.classes, index.label_kind, columns, index.class_samples])


def read_index(uri: str) -> Index:
    """Read the index of a packed folder.

    Raises:
        UserError: there is none, or it was written by another version, or it is empty.
        StorageError: it cannot be read.
    """
    location = storage.join(uri, INDEX_FILE)
    if not storage.exists(location):
        raise UserError(
            f"{uri} holds no {INDEX_FILE}, so it is no packed data set or its packing was "
            f"interrupted; run `orchestrator pack --source ... --out {uri}` (again)."
        )
    try:
        content = json.loads(storage.read_bytes(location))
        if (found := content.pop("format")) != FORMAT:
            raise UserError(
                f"{location} has format {found!r}, not {FORMAT}; pack the data again, into another "
                "folder."
            )
        splits = {name: Split(**split) for name, split in content.pop("splits").items()}
        classes = tuple(content.pop("classes"))
        counts = tuple(content.pop("class_samples"))
        index = Index(uri=uri, splits=splits, classes=classes, class_samples=counts, **content)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{location} is damaged ({error!r}); pack the data again.") from error
    if not all(split.chunks and split.samples for split in splits.values()) or not splits:
        raise UserError(f"{location} is an index without chunks; pack the data again.")
    return index


def read_shards(index: Index) -> list[Shard]:
    """Read every shard as an object, where there are few, and check the digest first.

    Raises:
        UserError: the table no longer has the digest that `INDEX.json` names.
    """
    _check_digest(index)
    blocks = shard_table.read_blocks(_table_uri(index))
    return [shard for block in blocks for shard in shard_table.shards_of(block)]


def _table_uri(index: Index) -> str:
    return storage.join(index.uri, index.table)


def _check_digest(index: Index) -> None:
    found = shard_table.digest(_head(index), shard_table.read_blocks(_table_uri(index)))
    if found != index.digest:
        raise UserError(
            f"{_table_uri(index)} does not have the digest {index.digest[:12]} that {INDEX_FILE} "
            "names, so one of them was changed; pack again."
        )


def verify(index: Index) -> None:
    """Check the shard table's digest, and size and ETag of up to 64 evenly spaced shards.

    Raises:
        UserError: the shards are no longer those that were indexed.
    """
    _check_digest(index)
    total = sum(split.shards for split in index.splits.values())
    picks = np.unique(np.linspace(0, total - 1, _SAMPLED_SHARDS).astype(np.int64))
    start = 0
    for block in shard_table.read_blocks(_table_uri(index), columns=["path", "bytes", "etag"]):
        inside = picks[(picks >= start) & (picks < start + block.num_rows)] - start
        for row in block.take(pa.array(inside)).to_pylist():
            _check_unchanged(shard_uri(index.uri, row["path"]), row["bytes"], row["etag"])
        start += block.num_rows


def _check_unchanged(location: str, expected: int, etag: str) -> None:
    found = storage.size(location)
    if found == expected and etag in ("", storage.etag(location) if etag else ""):
        return
    state = "was written again" if found == expected else f"has {found} bytes"
    state = "is missing" if found is None else state
    raise UserError(
        f"{location} {state} but the index says {expected} bytes, so the index's digest no longer "
        "matches its shards; restore the shard or pack again."
    )


def read_chunks(index: Index, split: str) -> Chunks:
    """Read where the chunks of one split lie and how many rows each has.

    Reads one split's part of the shard table: 80 bytes a shard.

    Raises:
        UserError: the index has no such split, or the table is not the one it was written with.
    """
    if split not in index.splits:
        raise UserError(
            f"{index.uri} has no split {split!r}, only {', '.join(index.splits)}; pack it with "
            f"--{split}-fraction above 0."
        )
    start = sum(total.shards for name, total in index.splits.items() if name < split)
    blocks = shard_table.read_blocks(
        _table_uri(index),
        columns=shard_table.CHUNK_COLUMNS,
        start=start,
        stop=start + index.splits[split].shards,
    )
    table = pa.concat_tables(blocks)
    sizes, first_chunk = shard_table.chunk_sizes(table)
    found = (sizes.num_samples, sizes.num_chunks, table.num_rows)
    total = index.splits[split]
    if found != (total.samples, total.chunks, total.shards):
        raise UserError(
            f"{_table_uri(index)} has {found[0]} samples of split {split!r} but {INDEX_FILE} says "
            f"{total.samples}, so one of them was changed; pack again."
        )
    paths, etags = (table[name].combine_chunks() for name in ("path", "etag"))
    num_bytes = table["bytes"].to_numpy()
    del table
    pa.default_memory_pool().release_unused()  # 90 MB at 2.4 million shards
    return Chunks(index.uri, sizes, paths, num_bytes, etags, first_chunk)
