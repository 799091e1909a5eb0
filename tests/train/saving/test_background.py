"""One thread for what steps must not wait for."""

import threading

from orchestrator.train.saving.background import Background


def test_what_comes_after_the_end_is_done_at_once() -> None:
    background = Background()
    done: list[threading.Thread] = []

    def job() -> None:
        done.append(threading.current_thread())

    background.submit(job)
    assert background.close(10)
    background.submit(job)  # a logger that fails while it is closed, after the last checkpoint
    assert done == [background._thread, threading.current_thread()]
