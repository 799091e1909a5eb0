"""Sources of every format, written small: tars, Parquet files, manifests."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage


def tar_bytes(members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar of (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def webdataset_tar(images: Mapping[str, bytes], labels: Mapping[str, object]) -> bytes:
    """Return a tar with `key.png` and `key.cls` of every key."""
    members = []
    for key, image in images.items():
        members += [(f"{key}.png", image), (f"{key}.cls", str(labels[key]).encode())]
    return tar_bytes(members)


def write_parquet(uri: str, columns: Mapping[str, object], *, group: int = 16, names=None) -> None:
    """Write a Parquet file; `names` are class names in Hugging Face's metadata."""
    table = pa.table(dict(columns))
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    storage.write_atomic(uri, buffer.getvalue())


def read_samples(source) -> tuple[list, list]:
    """Return (samples, bad) of all items of a format."""
    found = [s for part in range(source.parts) for s in source.read(source.items(part))]
    samples = [s for s in found if hasattr(s, "image")]
    return samples, [s for s in found if not hasattr(s, "image")]
