"""A small packed data set written directly: for tests that read one and need no Ray to make it."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from conftest import encode_png

from orchestrator.data.index import SHARD_SCHEMA, Index, Shard, write_index


def write_packed(
    root: Path,
    *,
    train: int = 40,
    val: int = 10,
    chunk_rows: int = 8,
    shard_rows: int = 20,
    num_classes: int = 3,
    broken: dict[str, bytes] | None = None,
    prefix: str = "",
    label_of: Callable[[int], int] | None = None,
) -> Index:
    """Write `train` and `val` images as shards; `broken` replaces the bytes of some ids."""
    label = label_of or (lambda i: i % num_classes)
    shards = []
    for split, count in (("train", train), ("val", val)):
        rows = [
            _row(f"{prefix}{split}-{i:04d}", split, i, label(i), broken or {}) for i in range(count)
        ]
        for start in range(0, count, shard_rows):
            part = rows[start : start + shard_rows]
            shards.append(_write_shard(root, split, start, part, chunk_rows))
    names = [f"class-{i}" for i in range(num_classes)]
    return write_index(str(root), classes=names, shards=shards, settings={}, quarantined=0)


def _row(
    sample_id: str, split: str, i: int, label: int, broken: dict[str, bytes]
) -> dict[str, object]:
    image = broken.get(sample_id, encode_png(i + 1000 * (split == "val")))
    return {
        "id": sample_id,
        "image": image,
        "label": label,
        "width": 8,
        "height": 8,
        "checksum": xxhash.xxh3_64_intdigest(image),
    }


def _write_shard(
    root: Path, split: str, start: int, rows: list[dict[str, object]], chunk_rows: int
) -> Shard:
    path = root / split / f"{start:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    # As `pack` writes them.
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SHARD_SCHEMA),
        path,
        row_group_size=chunk_rows,
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
    )
    sizes = [min(chunk_rows, len(rows) - at) for at in range(0, len(rows), chunk_rows)]
    return Shard(
        split=split,
        path=f"{split}/{path.name}",
        rows=len(rows),
        bytes=path.stat().st_size,
        content=xxhash.xxh3_64_intdigest(repr(rows).encode()),
        chunk_rows=tuple(sizes),
    )
