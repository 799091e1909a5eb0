"""Image files read some requests ahead, in order."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from orchestrator import storage
from orchestrator.data.formats import base
from orchestrator.data.formats.base import Bad

# Reads in flight in one task: a request to S3 takes some 20 ms, of which the client computes 3 ms,
# so about this many keep a task's CPU busy.
_READ_THREADS = 16
_READ_AHEAD = 32

T = TypeVar("T")


def read_ahead(
    items: Iterable[T], read: Callable[[T], bytes | Bad]
) -> Iterator[tuple[T, bytes | Bad]]:
    """Yield each item with what `read` returns for it."""
    pool = ThreadPoolExecutor(_READ_THREADS)
    try:
        pending = collections.deque[tuple[T, Future[bytes | Bad]]]()
        for item in items:
            pending.append((item, pool.submit(read, item)))
            if len(pending) > _READ_AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:  # whoever leaves early, for an error too, does not wait for what nobody reads
        pool.shutdown(cancel_futures=True)


def read_image(uri: str, sample_id: str, size: int | None) -> bytes | Bad:
    """Return an image file's bytes, or why it is left out.

    Args:
        uri: the file.
        sample_id: for the quarantine.
        size: as listed; None: it is asked for, which costs a request.

    Raises:
        StorageError: something other than a missing or forbidden file went wrong.
    """
    if storage.is_remote(uri) and "//" in uri.partition("://")[2]:
        return Bad.of(uri, sample_id, "bad_name: its key has `//`, which is no path")
    try:
        found = storage.size(uri) if size is None else size
        if found is not None and found > base.UNIT_BYTES:
            reason = f"too_large: the file has {found} bytes, more than {base.UNIT_BYTES}"
            return Bad.of(uri, sample_id, reason)
        return storage.read_bytes(uri)
    except storage.MissingError:
        return Bad.of(uri, sample_id, "missing: it was listed but is gone, or links to nothing")
    except storage.LockedOutError:
        raise
    except storage.DeniedError:
        return Bad.of(uri, sample_id, "denied: the credentials may not read it")
