"""Both sides: the loggers of `train.loggers`: checked by the driver, built and fed on rank 0."""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import threading
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from orchestrator import storage
from orchestrator.config import Config, UserError
from orchestrator.train import model
from orchestrator.train.logs.patient import Patient, Tell, patient

IDS_FILE = "loggers.json"
_ids_lock = threading.Lock()  # each logger writes its own, in a thread of its own
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
        _check_tracking(found, args, key=key)
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


def _check_tracking(found: type[Logger], args: dict[str, Any], *, key: str) -> None:
    """Ask for MLflow's server: 3.17 refuses folders, and mlflow-skinny knows no databases."""
    named = args.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI")
    if found.__name__ == "MLFlowLogger" and not named:
        raise UserError(
            f"{key}.init_args.tracking_uri is missing, and MLflow keeps no runs in folders any "
            "more; set it to a server such as http://localhost:5000."
        )


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
            folder.mkdir(parents=True, exist_ok=True)
            logger = patient(found, args, tell=tell)
            logger.once_it_works(functools.partial(_remember_id, run, name, logger))
            built.append(logger)
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
    if found.__name__ == "MLFlowLogger":
        del values["save_dir"]  # see _check_tracking
    return {k: v for k, v in values.items() if k in takes}


def _read_ids(run: str) -> dict[str, str]:
    location = storage.join(run, IDS_FILE)
    if not storage.exists(location):
        return {}
    ids: dict[str, str] = {}
    with contextlib.suppress(ValueError):  # damaged: they go on in runs of their own
        ids = json.loads(storage.read_bytes(location))
    return ids


def _remember_id(run: str, name: str, logger: Patient) -> None:
    """Write which run of its server a logger writes to, where the server chose it."""
    run_id = getattr(logger, "run_id", None)
    with _ids_lock:
        ids = _read_ids(run)
        if run_id and ids.get(name) != str(run_id):
            content = json.dumps({**ids, name: str(run_id)}).encode()
            storage.write_atomic(storage.join(run, IDS_FILE), content)
