"""Where chunks lie: number -> shard and row group. Pure; no Python object for a shard."""

import dataclasses

import numpy as np
import pyarrow as pa

from orchestrator import storage
from orchestrator.data.stream import ChunkSizes, Ints


@dataclasses.dataclass(frozen=True)
class ChunkRef:
    """Where one chunk lies."""

    uri: str
    """Of its shard."""
    group: int
    """Number of its row group there."""
    rows: int
    bytes: int
    """Of its shard."""
    etag: str = ""
    """Of its shard, as storage reported it; empty where it was not noted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """All chunks of one split, numbered from 0 in the order of the shard table."""

    uri: str
    sizes: ChunkSizes
    paths: pa.Array
    """Shard paths, strings, shape (shards,)."""
    bytes: Ints
    """Of each shard, shape (shards,)."""
    etags: pa.Array
    """Of each shard, strings, shape (shards,)."""
    first_chunk: Ints
    """Number of each shard's first chunk, and the total last, shape (shards + 1,)."""

    def locate(self, chunks: Ints) -> list[ChunkRef]:
        """Return where each of the chunk numbers, shape (n,), lies."""
        shards = np.searchsorted(self.first_chunk, chunks, side="right") - 1
        groups = (chunks - self.first_chunk[shards]).tolist()
        rows = self.sizes.rows(chunks).tolist()
        uris = [shard_uri(self.uri, path) for path in self.paths.take(shards).to_pylist()]
        sizes, etags = self.bytes[shards].tolist(), self.etags.take(shards).to_pylist()
        return [ChunkRef(*ref) for ref in zip(uris, groups, rows, sizes, etags, strict=True)]


def shard_uri(folder: str, path: str) -> str:
    return path if "://" in path or path.startswith("/") else storage.join(folder, path)
