"""Ranges: which requests fetch them, and that local files and buckets answer alike."""

import itertools
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import storage
from orchestrator.stores.reading import coalesce

RANGES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 700)).map(lambda r: (r[0], r[0] + r[1])),
    max_size=20,
)


@given(RANGES, st.integers(0, 300), st.integers(1, 2000))
def test_coalesced_ranges_cover_all_and_stay_apart(ranges, near, longest):
    merged = coalesce(ranges, near_bytes=near, longest_bytes=longest)
    for start, stop in ranges:
        assert start == stop or any(a <= start and stop <= b for a, b in merged)
    for (_, last), (first, _) in itertools.pairwise(merged):
        assert last <= first
    wanted = {i for start, stop in ranges for i in range(start, stop)}
    fetched = sum(stop - start for start, stop in merged)
    assert fetched <= len(wanted) + near * max(0, len(ranges) - 1)


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([(0, 10), (10, 20), (25, 30)], [(0, 30)]),
        ([(0, 10), (21, 30)], [(0, 10), (21, 30)]),
        ([(20, 30), (0, 5), (0, 5)], [(0, 5), (20, 30)]),
        ([(0, 60), (60, 120)], [(0, 60), (60, 120)]),
        ([(0, 60), (50, 120)], [(0, 120)]),
        ([(5, 5)], []),
    ],
)
def test_near_ranges_become_one_request(ranges, merged):
    assert coalesce(ranges, near_bytes=10, longest_bytes=100) == merged


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def file(request, tmp_path):
    """Return the URI and the content of a file of 5 MB."""
    content = os.urandom(5_000_000)
    root = str(tmp_path)
    if request.param == "s3":
        root = f"{request.getfixturevalue('s3').make_bucket('reading')}/{time.time_ns()}"
    storage.write_atomic(f"{root}/file", content)
    return f"{root}/file", content


@given(RANGES)
def test_ranges_of_a_local_file_are_its_bytes(tmp_path_factory, ranges):
    path = tmp_path_factory.getbasetemp() / "ranges"
    content = bytes(range(256)) * 30
    path.write_bytes(content)
    assert [bytes(r) for r in storage.read_ranges(str(path), ranges)] == [
        content[start:stop] for start, stop in ranges
    ]


def test_ranges_come_in_the_order_asked_for(file):
    uri, content = file
    ranges = [(4_000_000, 4_000_010), (0, 3), (3, 3), (2, 1_500_000), (4_999_999, 5_000_000)]
    got = storage.read_ranges(uri, ranges, etag=storage.etag(uri), size=len(content))
    assert [bytes(r) for r in got] == [content[start:stop] for start, stop in ranges]


def test_another_version_is_not_read(file):
    uri, content = file
    etag = storage.etag(uri)
    time.sleep(0.01)
    storage.write_atomic(uri, content[::-1])
    with pytest.raises(storage.ChangedError, match="pack again"):
        storage.read_ranges(uri, [(0, 10)], etag=etag)
    with pytest.raises(storage.ChangedError, match="5000000 bytes but the index says 77"):
        storage.read_ranges(uri, [(0, 10)], size=77)


@pytest.mark.parametrize("span", [(4_999_990, 5_000_010), (6_000_000, 6_000_001)])
def test_a_range_behind_the_end_is_refused(file, span):
    with pytest.raises(storage.ChangedError, match=r"restore it or pack again"):
        storage.read_ranges(file[0], [span])


def test_ranges_of_nothing_are_refused(file):
    with pytest.raises(storage.MissingError, match="there is no such"):
        storage.read_ranges(file[0] + "-not", [(0, 10)])
    assert storage.etag(file[0] + "-not") is None


def test_a_file_is_read_at_any_place(file):
    uri, content = file
    with storage.open_input(uri) as opened:
        assert opened.seek(-5, os.SEEK_END) == 4_999_995
        assert opened.read() == content[-5:]
        assert opened.read(1) == b""
        opened.seek(10)
        assert opened.read(5) == content[10:15]
        assert opened.seek(5, os.SEEK_CUR) == opened.tell() == 20
        buffer = bytearray(7)
        opened.readinto(buffer)
        assert buffer == content[20:27]
