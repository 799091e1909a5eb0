"""When a validation is taken to hang. Pure."""

import threading
import time

from orchestrator.train.validation.watchdog import Watchdog


def test_a_block_that_gets_nowhere_is_ended() -> None:
    for batches in (0, 1, 3):
        ended = threading.Event()
        watchdog = Watchdog(0.02, ended.set)
        with watchdog.watching():
            for _ in range(batches):
                watchdog.note()
            assert ended.wait(10)


def test_a_batch_may_take_ten_times_as_long_as_the_longest_so_far() -> None:
    ended = threading.Event()
    watchdog = Watchdog(0.001, ended.set)
    with watchdog.watching():
        for _ in range(2):
            watchdog.note()
        watchdog._longest_s = 3600.0
        time.sleep(0.2)
        watchdog.note()
        time.sleep(0.2)
    assert not ended.is_set()
