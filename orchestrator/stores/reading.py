"""Ranges of an object: which requests fetch them, in parallel, and a file that reads by ranges."""

import functools
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.stores import objects

# A request costs S3 20 to 50 ms before its first byte, in which a connection moves about 1 MB.
_NEAR_BYTES = 1 << 20
_LONGEST_BYTES = 64 << 20
_THREADS = 8


def coalesce(
    ranges: Sequence[tuple[int, int]],
    *,
    near_bytes: int = _NEAR_BYTES,
    longest_bytes: int = _LONGEST_BYTES,
) -> list[tuple[int, int]]:
    """Return fewer, longer ranges that cover all given ones, ascending.

    Ranges at most `near_bytes` apart become one, unless it would be longer than `longest_bytes`;
    a range itself is never cut, and one that overlaps its neighbour always joins it.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[1] > r[0]):
        if merged:
            first, last = merged[-1]
            joined = (first, max(last, stop))
            near = start <= last + near_bytes and joined[1] - first <= longest_bytes
            if start < last or near:
                merged[-1] = joined
                continue
        merged.append((start, stop))
    return merged


def read_ranges(
    uri: str,
    ranges: Sequence[tuple[int, int]],
    *,
    etag: str | None,
    size: int | None,
    patience_s: float | None,
) -> list[memoryview]:
    """Return byte ranges of an object; see `storage.read_ranges`."""
    requests = coalesce(ranges)
    get = functools.partial(objects.get, uri, etag=etag, size=size, patience_s=patience_s)
    if len(requests) > 1:
        parts = list(_threads(os.getpid()).map(get, requests))
    else:
        parts = [get(request) for request in requests]
    return [_cut(r, requests, parts) for r in ranges]


def _cut(
    wanted: tuple[int, int], requests: list[tuple[int, int]], parts: list[memoryview]
) -> memoryview:
    start, stop = wanted
    for (first, last), part in zip(requests, parts, strict=True):
        if first <= start and stop <= last:
            return part[start - first : stop - first]
    return memoryview(b"")  # only an empty range lies in no request


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")


class ObjectFile(io.RawIOBase):
    """An object as a file open for reading: each read is one ranged request, nothing is kept."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri
        self._size, self._etag = objects.head(uri)
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position; return it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, fewer at the end; all for -1."""
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if stop <= self._at:
            return b""
        # The ETag keeps a reader from mixing two versions of an object written meanwhile.
        content = bytes(objects.get(self._uri, (self._at, stop), etag=self._etag or None))
        self._at = stop
        return content

    def readall(self) -> bytes:
        """Return the rest."""
        return self.read(-1)

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer; return how many bytes of it."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
