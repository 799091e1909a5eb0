import threading

import pytest

from orchestrator.data.formats.reading import read_ahead, read_image


def test_who_leaves_early_does_not_wait_for_what_nobody_reads():
    started, go = [], threading.Event()

    def read(item):
        started.append(item)
        if item == 0:
            raise ValueError("broken")
        go.wait(10)
        return b""

    reading = read_ahead(range(33), read)
    threading.Timer(0.2, go.set).start()
    with pytest.raises(ValueError, match="broken"):
        next(reading)
    # The 16 threads: one has failed and taken another item. The rest is never begun.
    assert len(started) <= 18


def test_a_key_that_is_no_path_is_one_bad_sample():
    bad = read_image("s3://bucket/src//a.png", "/a.png", 3)
    assert bad.reason == "bad_name: its key has `//`, which is no path"
