"""YAML and dotted flags -> a checked `Config`, and the help text of every field.

jsonargparse was tried here and set aside: it imports `class_path` while parsing (a typing mistake
then ends in a stack trace, and the head of a cluster needs the user's packages) and cannot take
dotted keys inside `tune.space`. pydantic checks the types; this file finds unknown keys.
"""

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import pydantic
import yaml

from orchestrator import storage
from orchestrator.config import Config, UserError
from orchestrator.overrides import section_of, to_dict, unknown_key_message


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; people mean the number (YAML 1.2 agrees)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str | bytes, *, source: str) -> Any:
    """Parse YAML with the safe loader.

    Raises:
        UserError: with the line and what is wrong there.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{source}{line} is not valid YAML: {problem}; mend it there.") from error


def load(path: str | None, flags: Sequence[str] = ()) -> Config:
    """Read a config file and apply `--section.field VALUE` flags over it.

    Raises:
        UserError: a key does not exist or a value does not fit its field.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        content = parse_yaml(storage.read_bytes(path), source=path)
        if not isinstance(content, dict):
            raise UserError(f"{path} must hold a YAML mapping such as `name: my-run`; see README.")
        tree = content
    for key, value in parse_flags(flags):
        tree = _set(tree, key.split("."), value)
    return from_dict(tree)


def parse_flags(flags: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, YAML value) of `--a.b VALUE` and `--a.b=VALUE`."""
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"argument {flag!r} is not of the form --section.field VALUE.")
        key, has_value, value = flag[2:].partition("=")
        if not has_value:
            if not rest:
                raise UserError(f"--{key} needs a value: --{key} VALUE.")
            value = rest.pop(0)
        yield key, parse_yaml(value, source=f"--{key}")


def _set(tree: Any, path: list[str], value: Any) -> dict[str, Any]:
    base = tree if isinstance(tree, dict) else {}
    if len(path) == 1:
        return {**base, path[0]: value}
    return {**base, path[0]: _set(base.get(path[0]), path[1:], value)}


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Return the config that plain dicts describe, defaults filled in.

    Raises:
        UserError: a key does not exist or a value does not fit its field.
    """
    known = _known(Config, tree, "")
    try:
        return pydantic.TypeAdapter(Config).validate_python(known)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if key.startswith("scaling.num_workers."):  # pydantic names the alternative it tried
            raise UserError(
                f"config key 'scaling.num_workers': {first['input']!r} is neither a whole number "
                "nor two of them as in [2, 8]; change it."
            ) from error
        raise UserError(
            f"config key {key!r}: {first['msg'].lower()}, but it is {first['input']!r}; change it "
            "(`orchestrator train --help` describes every key)."
        ) from error


def _known(section: type, tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return `tree` if all its keys exist, with `precision: 32` read as the word "32"."""
    known = _fields(section)
    checked = dict(tree)
    for key, value in tree.items():
        if key not in known:
            names = [f"{prefix}{name}" for name in known]
            raise UserError(unknown_key_message(f"{prefix}{key}", names))
        inner = section_of(known[key])
        if inner is not None and isinstance(value, Mapping):
            checked[key] = _known(inner, value, f"{prefix}{key}.")
        elif str(value) in get_args(known[key]):
            checked[key] = str(value)
    return checked


def _fields(section: type) -> dict[str, Any]:
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def dump(config: Config) -> str:
    """Return a config as YAML that `load` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def help_text(section: type = Config, prefix: str = "") -> str:
    """Return one line for each field: dotted flag, default, docstring."""
    docs = _field_docs(section)
    lines = []
    for field in dataclasses.fields(section):
        inner = section_of(_fields(section)[field.name])
        if inner is not None:
            lines.append(help_text(inner, f"{prefix}{field.name}."))
        else:
            lines.append(f"  --{prefix}{field.name} (default {_default(field)})")
            lines.append(f"      {docs[field.name]}")
    return "\n".join(lines)


def _default(field: "dataclasses.Field[Any]") -> str:
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return json.dumps(value)


def _field_docs(section: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(after.value, ast.Constant)
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs
