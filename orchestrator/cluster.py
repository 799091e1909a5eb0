"""Driver side: connect to the Ray cluster this process belongs to, or start one on this machine."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator

import ray
from ray.exceptions import RayTaskError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util import placement_group_table

from orchestrator.config import UserError

# Of Ray 2.60: `DEBUG_AUTOSCALING_STATUS` of ray/_private/ray_constants.py, and
# `format_readonly_node_type` of ray/autoscaler/_private/util.py.
_STATUS_KEY = "__autoscaling_status"
_TYPE_OF_ITS_OWN = re.compile("node_[0-9a-f]{56}")


def connect(*, verbose: bool = False) -> None:
    """Join the cluster that `RAY_ADDRESS` names (as in a submitted job), else start a local one.

    Ray's own log lines are folded away unless `verbose`; they stay in Ray's session folder.
    """
    if ray.is_initialized():
        return
    # A worker that reserves no GPU must not see one: libraries would choose it by themselves.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    options = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        ray.init(address="local", include_dashboard=False, **options)


def may_grow() -> bool:
    """Return whether the connected cluster might add nodes: one that `RAY_ADDRESS` names might."""
    return bool(os.environ.get("RAY_ADDRESS")) and has_autoscaler(_internal_kv_get(_STATUS_KEY))


def has_autoscaler(status: bytes | None) -> bool:
    """Return whether a cluster has an autoscaler, by what its monitor last said of it.

    Without the config of an autoscaler it takes each node to be of a type of its own, named after
    the node. A monitor that says nothing may be one of KubeRay that starts up.
    """
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    types = report.get("active_nodes") or {}
    return not types or not all(_TYPE_OF_ITS_OWN.fullmatch(name) for name in types)


def groups_of_job() -> set[str]:
    """Return the ids of the placement groups that this process's job holds or waits for."""
    job = ray.get_runtime_context().get_job_id()
    # An id ends with that of its job.
    return {
        number
        for number, group in placement_group_table().items()
        if group["state"] != "REMOVED" and number.endswith(job)
    }


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost exception of what Ray, Ray Train or Ray Data raised."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        causes = [root_cause(failure) for failure in failures.values()]
        # Where one worker fails, the others only lose their connection to it, which PyTorch
        # says as a RuntimeError (DistBackendError on GPUs).
        own = [cause for cause in causes if not isinstance(cause, RuntimeError)]
        mistakes = [cause for cause in causes if isinstance(cause, UserError)]
        return next(iter([*mistakes, *own, *causes]))
    inner = (
        getattr(error, "cause", None)
        or getattr(error, "controller_failure", None)
        or error.__cause__
    )
    return root_cause(inner) if isinstance(inner, BaseException) else error


def sentence(error: BaseException) -> str:
    """Return an error's own words, without the lines that Ray Data appends to them."""
    return (str(error).splitlines() or [""])[0]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raise a UserError of a Ray task as itself, without Ray's wrapping and its traces."""
    try:
        yield
    except RayTaskError as error:
        cause = root_cause(error)
        if isinstance(cause, UserError):
            raise type(cause)(sentence(cause)) from error
        raise


def import_paths() -> list[str]:
    """Return the folders that this process imports from, for `extend_imports` on a worker."""
    return [os.path.abspath(path) for path in sys.path]


def extend_imports(paths: list[str]) -> None:
    """Let this worker import the user's modules from where the driver does, its own paths first."""
    sys.path += [path for path in paths if path not in sys.path and os.path.exists(path)]
