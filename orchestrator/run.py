"""A run's folder under `storage_path`: its config, events and result, each written atomically."""

import datetime
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator import configfile, storage
from orchestrator.config import Config, UserError
from orchestrator.overrides import differences, identity

CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"
EVALUATION_FILE = "evaluation.json"
QUARANTINE_FILE = "quarantine.parquet"
METRICS_FILE = "metrics.parquet"
# What a failure's event tells the next start.
_FAILURE = ("error", "cause", "step")

_log = logging.getLogger(__name__)


def run_uri(config: Config) -> str:
    """Return the URI of the run's folder."""
    return storage.join(storage.absolute(config.storage_path), config.name)


def open_run(config: Config) -> str:
    """Create the run's folder or find it again, and return its URI.

    Raises:
        UserError: the folder belongs to a run with another config, or cannot be written.
    """
    check_same_run(config)
    run = run_uri(config)
    text = configfile.dump(config)
    storage.write_atomic(storage.join(run, CONFIG_FILE), f"{text}{_seal(text)}".encode())
    return run


def _seal(text: str) -> str:
    """Return the last line of a config file, which a torn or altered one lacks."""
    return f"# sha256 of the lines above: {hashlib.sha256(text.encode()).hexdigest()}\n"


def check_same_run(config: Config) -> None:
    """Check that the run's folder, where there is one, was made by this config; write nothing.

    Raises:
        UserError: it belongs to a run with another config.
    """
    run = run_uri(config)
    if not storage.exists(storage.join(run, CONFIG_FILE)):
        return
    changed = differences(identity(read_config(run)), identity(config))
    if changed:
        raise UserError(
            f"{run} belongs to another config: {changed}; give this run another --name, or take "
            "the change back."
        )


def read_config(run: str) -> Config:
    """Read the config a run was started with.

    Raises:
        UserError: the folder holds no run, or its config is torn.
    """
    location = storage.join(run, CONFIG_FILE)
    if not storage.exists(location):
        raise UserError(f"{run} holds no {CONFIG_FILE}, so it is no run; check --run.")
    lines = storage.read_bytes(location).decode(errors="replace").splitlines(keepends=True)
    if lines[-1:] != [_seal("".join(lines[:-1]))]:
        raise UserError(
            f"{location} is damaged: its last line is not the checksum of the others; restore it, "
            "or delete it to go on with the config that you submit."
        )
    return configfile.load(location)


def append_event(run: str, kind: str, **fields: Any) -> None:
    """Add one line to `events.jsonl`; driver, controller and workers do, each when it has to."""
    append_events(run, [(kind, fields)])


def append_events(run: str, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Add a line for each (kind, fields) at once: a bucket takes as long as for one."""
    moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    lines = [json.dumps({"time": moment, "event": kind, **fields}) for kind, fields in events]
    content = "".join(f"{line}\n" for line in lines)
    storage.append(storage.join(run, EVENTS_FILE), content.encode())


def read_events(run: str) -> list[dict[str, Any]]:
    """Return all events in order; a line that a kill cut off or that is damaged is left out."""
    location = storage.join(run, EVENTS_FILE)
    if not storage.exists(location):
        return []
    lines = storage.read_bytes(location).decode(errors="replace").split("\n")[:-1]
    events = [_parse(line) for line in lines if line]
    damaged = sum(event is None for event in events)
    if damaged:
        _log.warning("%s: %d damaged lines are left out", location, damaged)
    return [event for event in events if event is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
        datetime.datetime.fromisoformat(event["time"])
        fields = {"event", *(_FAILURE if event["event"] == "failure" else ())}
    except (ValueError, KeyError, TypeError):
        return None
    return event if event.keys() >= fields and isinstance(event["event"], str) else None


def failures_since_submission(run: str) -> list[dict[str, Any]]:
    """Return error, cause, step and time (`at`, seconds since 1970) of each failure since then."""
    events = read_events(run)
    kinds = [event["event"] for event in events]
    begun = max((i for i, kind in enumerate(kinds) if kind == "submitted"), default=-1)
    return [
        {key: event[key] for key in _FAILURE}
        | {"at": datetime.datetime.fromisoformat(event["time"]).timestamp()}
        for event in events[begun + 1 :]
        if event["event"] == "failure"
    ]


def write_result(run: str, result: Mapping[str, Any]) -> None:
    """Write `result.json`: its presence says that the run ended."""
    content = json.dumps(result, indent=1).encode()
    storage.write_atomic(storage.join(run, RESULT_FILE), content)


def read_result(run: str) -> dict[str, Any] | None:
    """Return `result.json`, or None while the run has not ended."""
    location = storage.join(run, RESULT_FILE)
    if not storage.exists(location):
        return None
    result: dict[str, Any] = json.loads(storage.read_bytes(location))
    return result
