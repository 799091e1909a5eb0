"""Both sides: the loggers of `train.loggers`: checked by the driver, built and fed on rank 0."""

import hashlib
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from orchestrator import storage
from orchestrator.config import Config, UserError
from orchestrator.train import model
from orchestrator.train.logs.patient import Patient, Tell, patient

IDS_FILE = "loggers.json"
# What Lightning's own loggers import when they are built.
_PACKAGES = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}


def check_loggers(config: Config) -> None:
    """Hold `train.loggers` against the classes that they name; nothing is built.

    Raises:
        UserError: an entry is none, its class does not import, is no Logger or does not take the
            arguments.
    """
    for number, entry in enumerate(config.train.loggers):
        key = f"train.loggers[{number}]"
        found, args = _checked(entry, key=key)
        args = {**_defaults(found, config, "", Path(), "", None), **args}
        model.check_args(found, args, key=f"{key}.init_args", class_path=entry["class_path"])


def _checked(entry: dict[str, Any], *, key: str) -> tuple[type[Logger], dict[str, Any]]:
    class_path, args = entry.get("class_path"), entry.get("init_args") or {}
    is_pair = isinstance(class_path, str) and isinstance(args, dict)
    if not is_pair or entry.keys() - {"class_path", "init_args"}:
        raise UserError(
            f"{key}={entry!r} must be {{class_path: ..., init_args: {{...}}}}; write it so."
        )
    found = model.import_class(str(class_path), key=f"{key}.class_path")
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise UserError(
            f"{key}.class_path={class_path!r} is no Logger of the package pytorch_lightning; derive"
            " it from pytorch_lightning.loggers.Logger."
        )
    package = _PACKAGES.get(found.__name__)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"{key}.class_path={class_path!r} needs the package {package}, which is not installed; "
            f"run `pip install 'orchestrator[{package}]'`."
        )
    return found, args


def build_loggers(config: Config, run: str, folder: Path, tell: Tell) -> list[Patient]:
    """Build the run's loggers; one that cannot be built is told of and left out.

    Args:
        config: the run's.
        run: URI of its folder.
        folder: a local folder for what they write, where they are not told another.
        tell: takes the event of a logger that fails.
    """
    ids = _read_ids(run)
    built = []
    for number, entry in enumerate(config.train.loggers):
        found, args = _checked(entry, key=f"train.loggers[{number}]")
        name = f"{number}-{found.__name__}"
        args = {**_defaults(found, config, run, folder, name, ids.get(name)), **args}
        try:
            built.append(patient(found, args, tell=tell))
        except Exception as error:  # a server that is gone must not end training
            tell("logger_failed", logger=found.__name__, error=model.describe(error), lost=0)
    return built


def _defaults(
    found: type[Logger], config: Config, run: str, folder: Path, name: str, known: str | None
) -> dict[str, Any]:
    """Return arguments that name the run, and find it again when training goes on."""
    takes = inspect.signature(found).parameters
    own = hashlib.sha256(f"{run}/{name}".encode()).hexdigest()[:16]
    values: dict[str, Any] = {"save_dir": str(folder), "run_name": config.name}
    if known is not None:
        values["run_id"] = known
    if found.__name__ == "WandbLogger":
        values |= {"name": config.name, "id": own}
        return {k: v for k, v in values.items() if k in takes} | {"resume": "allow"}
    return {k: v for k, v in values.items() if k in takes}


def _read_ids(run: str) -> dict[str, str]:
    location = storage.join(run, IDS_FILE)
    if not storage.exists(location):
        return {}
    ids: dict[str, str] = json.loads(storage.read_bytes(location))
    return ids


def remember_ids(run: str, loggers: list[Patient]) -> None:
    """Write which run of its server each logger writes to, where the server chose it."""
    found = {f"{n}-{each.kind}": getattr(each, "run_id", None) for n, each in enumerate(loggers)}
    ids = {name: str(run_id) for name, run_id in found.items() if run_id}
    if ids:
        storage.write_atomic(storage.join(run, IDS_FILE), json.dumps(ids).encode())
