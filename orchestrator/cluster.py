"""Driver side: connect to the Ray cluster this process belongs to, or start one on this machine."""

import contextlib
import logging
import os
import sys

import ray

logger = logging.getLogger(__name__)


def connect(*, verbose: bool = False) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as in a submitted job), else start a local one.

    Ray's own log lines are folded away unless `verbose`; they stay in Ray's session folder.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers import the user's module from where the command was started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    options = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w")))
            )
        ray.init(address="local", include_dashboard=False, **options)
