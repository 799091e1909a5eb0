"""Which client reads a bucket fastest, and at what CPU time: obstore, pyarrow, s3fs and ours.

    python jobs/bench_read.py --bucket s3://bucket/prefix [--objects 256] [--repeats 5]

Writes objects of 100 kB and one shard of 400 MB below the prefix (`AWS_*` variables name the
server), then reads in turns: every object whole, and every row group of 6 MB in the shard as four
adjacent ranges, the way its column chunks lie. Prints the median of the turns with their spread,
and the CPU time of this process a request; the server's own CPU time is not in it, but on one
machine it competes for the same cores. The objects are deleted at the end.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import obstore
import s3fs
from obstore.store import S3Store

from orchestrator import storage
from orchestrator.stores import identity

OBJECT_BYTES = 100_000
GROUP_BYTES = 6_000_000
SHARD_BYTES = 400_000_000
# Shares of a row group: ids, images, labels, checksums.
COLUMNS = (0.0, 0.01, 0.98, 0.99, 1.0)

Spans = list[tuple[int, int]]
Read = Callable[[str, Spans], int]
"""Reads an object (no spans: the whole of it); returns how many bytes came."""


def read_obstore(bucket: str) -> Read:
    """Return a reader on obstore as its documentation shows it."""
    store = S3Store(bucket, **identity.reader_options(bucket, {}))

    def read(key: str, spans: Spans) -> int:
        if not spans:
            return len(obstore.get(store, key).bytes())
        starts, ends = zip(*spans, strict=True)
        return sum(map(len, obstore.get_ranges(store, key, starts=starts, ends=ends)))

    return read


def read_pyarrow(bucket: str) -> Read:
    """Return a reader on pyarrow's S3 client; it does not join ranges, so one covers them all."""
    files, root = storage.arrow_filesystem(f"s3://{bucket}")

    def read(key: str, spans: Spans) -> int:
        with files.open_input_file(f"{root}/{key}") as file:
            if not spans:
                return len(file.read_buffer())
            file.seek(spans[0][0])
            return len(file.read_buffer(spans[-1][1] - spans[0][0]))

    return read


def read_s3fs(bucket: str) -> Read:
    """Return a reader on s3fs."""
    files: Any = s3fs.S3FileSystem(endpoint_url=identity.endpoint(), use_listings_cache=False)

    def read(key: str, spans: Spans) -> int:
        path = f"{bucket}/{key}"
        if not spans:
            return len(files.cat_file(path))
        return len(files.cat_file(path, start=spans[0][0], end=spans[-1][1]))

    return read


def read_ours(bucket: str) -> Read:
    """Return a reader on our own hot path: obstore with our retries, checks and counts."""

    def read(key: str, spans: Spans) -> int:
        uri = f"s3://{bucket}/{key}"
        if not spans:
            return len(storage.read_bytes(uri))
        return sum(map(len, storage.read_ranges(uri, spans)))

    return read


READERS = {
    "obstore": read_obstore,
    "pyarrow": read_pyarrow,
    "s3fs": read_s3fs,
    "ours": read_ours,
}


def row_groups() -> Iterator[Spans]:
    """Yield the ranges of each row group in the shard."""
    for start in range(0, SHARD_BYTES - GROUP_BYTES + 1, GROUP_BYTES):
        edges = [start + round(share * GROUP_BYTES) for share in COLUMNS]
        yield list(itertools.pairwise(edges))


def write_objects(root: str, count: int) -> None:
    """Write the small objects and the shard."""
    random = np.random.default_rng(0)
    with ThreadPoolExecutor(8) as pool:
        contents = [random.bytes(OBJECT_BYTES) for _ in range(count)]
        list(pool.map(storage.write_atomic, [f"{root}/{i:05d}" for i in range(count)], contents))
    storage.write_atomic(f"{root}/shard", random.bytes(SHARD_BYTES))


def turn(read: Read, work: list[tuple[str, Spans]], threads: int) -> tuple[float, float, int]:
    """Return (seconds, CPU seconds of this process, bytes) of reading all of `work`."""
    cpu, start = time.process_time(), time.perf_counter()
    if threads == 1:
        num_bytes = sum(read(key, spans) for key, spans in work)
    else:
        with ThreadPoolExecutor(threads) as pool:
            num_bytes = sum(pool.map(lambda item: read(*item), work))
    return time.perf_counter() - start, time.process_time() - cpu, num_bytes


def measure(bucket: str, work: list[tuple[str, Spans]], *, threads: int, repeats: int) -> None:
    """Read `work` with every client in turns and print one line for each."""
    readers = {name: make(bucket) for name, make in READERS.items()}
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in readers}
    for read in readers.values():
        turn(read, work[:8], threads)  # connections and imports are not what is measured
    for repeat in range(repeats):
        names = list(readers)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            seen[name].append(turn(readers[name], work, threads))
    for name, turns in seen.items():
        rates = sorted(len(work) / seconds for seconds, _, _ in turns)
        per_s = statistics.median(rates)
        cpu_ms = statistics.median(1000 * cpu / len(work) for _, cpu, _ in turns)
        mb = per_s * turns[0][2] / len(work) / 1e6
        print(
            f"  {name:8} {per_s:8.1f} /s [{rates[0]:.1f} to {rates[-1]:.1f}]  {mb:7.1f} MB/s  "
            f"{cpu_ms:7.2f} CPU ms each"
        )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bucket", required=True, help="s3:// URI of a folder to write into")
    parser.add_argument("--objects", type=int, default=256, help="objects of 100 kB")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each client")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8], help="reading threads")
    args = parser.parse_args()
    root = storage.join(args.bucket, f"bench-read-{os.getpid()}")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    write_objects(root, args.objects)
    try:
        objects: list[tuple[str, Spans]] = [(f"{prefix}/{i:05d}", []) for i in range(args.objects)]
        groups = [(f"{prefix}/shard", spans) for spans in row_groups()]
        for threads in args.threads:
            for title, work in (("objects of 100 kB", objects), ("row groups of 6 MB", groups)):
                print(f"{len(work)} {title}, {threads} threads, {args.repeats} turns", flush=True)
                measure(bucket, work, threads=threads, repeats=args.repeats)
    finally:
        storage.delete_folder(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
