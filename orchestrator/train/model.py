"""The user's LightningModule by import path: found, checked and built."""

import difflib
import importlib
import importlib.util
import inspect
import traceback
from typing import Any

import pytorch_lightning as pl

from orchestrator.config import ModelConfig, UserError


def refuse_second_lightning() -> None:
    """Refuse to run where the package `lightning` lies beside `pytorch-lightning`.

    Raises:
        UserError: Ray would import `lightning`, and its type checks would fail on our classes.
    """
    if importlib.util.find_spec("lightning") is not None:
        raise UserError(
            "both `lightning` and `pytorch-lightning` are installed and Ray would take the first, "
            "so that type checks between them break; run `pip uninstall lightning`."
        )


def import_class(class_path: str, *, key: str) -> Any:
    """Import what a class path names.

    Raises:
        UserError: it does not import or does not exist.
    """
    module_name, _, class_name = class_path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else None
    except Exception as error:  # the user's module runs here and may raise anything
        raise UserError(
            f"{key}={class_path!r} does not import ({describe(error)}); check the "
            "spelling, and that its package is installed or lies where the command is run."
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        near = difflib.get_close_matches(class_name, dir(module), n=1) if module else []
        hint = f"did you mean {module_name}.{near[0]}?" if near else "name it package.module.Class."
        raise UserError(f"{key}={class_path!r} names no class: {hint}")
    return found


def find_class(class_path: str) -> type[pl.LightningModule]:
    """Import the LightningModule that `class_path` names.

    Raises:
        UserError: it does not import, does not exist or is no LightningModule.
    """
    found = import_class(class_path, key="model.class_path")
    if not (isinstance(found, type) and issubclass(found, pl.LightningModule)):
        raise UserError(
            f"model.class_path={class_path!r} is no LightningModule of the package "
            "pytorch_lightning; derive it from pytorch_lightning.LightningModule."
        )
    return found


def check_args(found: Any, args: dict[str, Any], *, key: str, class_path: str) -> None:
    """Hold arguments against a constructor.

    Raises:
        UserError: it does not take one of them or lacks one.
    """
    parameters = inspect.signature(found).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in args:
        if name not in parameters and not takes_any:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(parameters)}."
            raise UserError(f"{key}.{name}: {class_path} takes no such argument; {hint}")
    try:
        inspect.signature(found).bind(**args)
    except TypeError as error:
        raise UserError(f"{key} do not fit {class_path}: {error}; add it.") from error


def init_args(model: ModelConfig, *, num_classes: int) -> dict[str, Any]:
    """Return the constructor's arguments; `num_classes` is filled in where it takes that.

    Raises:
        UserError: the constructor does not take one of them or lacks one.
    """
    found = find_class(model.class_path)
    args = dict(model.init_args)
    if "num_classes" in inspect.signature(found).parameters and args.get("num_classes") is None:
        args["num_classes"] = num_classes
    check_args(found, args, key="model.init_args", class_path=model.class_path)
    return args


def build(model: ModelConfig, *, num_classes: int) -> pl.LightningModule:
    """Construct the LightningModule.

    Raises:
        UserError: see `find_class` and `init_args`; also what the constructor itself refuses.
    """
    args = init_args(model, num_classes=num_classes)
    try:
        return find_class(model.class_path)(**args)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model.init_args={model.init_args!r}: {model.class_path} refuses them "
            f"({describe(error)}); change them."
        ) from error


def describe(error: Exception) -> str:
    """Return an error's type, its first line and where it was raised."""
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, ModuleNotFoundError):
        return line
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line}, {frame.filename} line {frame.lineno}"
