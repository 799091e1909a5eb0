"""Driver side: Ctrl-C ends a run also where Ray Train's controller answers nothing."""

import contextlib
import signal
import sys
from typing import Any

import ray
from ray.exceptions import RayError

# Ending running workers takes about a second.
_ABORT_S = 10.0


def abort_at_interrupt(controller: Any) -> None:
    """At Ctrl-C let a controller end its workers, and end it itself where it does not answer.

    Ray 2.60 waits for its answer for ever: it gives none while it starts workers, or waits for
    nodes, since its loop awaits nothing then. A second Ctrl-C ends the driver at once.
    """

    def abort(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(RayError):  # it is gone, or its time is up
            ray.get(controller.abort.remote(), timeout=_ABORT_S)
        ray.kill(controller)
        sys.exit(0)  # as Ray does

    signal.signal(signal.SIGINT, abort)
