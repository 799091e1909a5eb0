"""A config as data: dotted paths, changed copies, and what makes a run that run. Pure.

Nothing is ever patched in place: `with_overrides` returns a copy.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from orchestrator.config import Config, UserError

# What may differ when a run is resubmitted: neither the data's order nor a step's arithmetic
# depends on these.
_FREE_TO_CHANGE = (
    "storage_path",
    "data.max_micro_batch",
    "data.eval_batch",
    "data.decode_slots",
    "data.max_bad_fraction",
    "train.checkpoint",
    "train.early_stopping",
    "train.max_epochs",
    "train.max_failures",
    "train.hang_timeout_s",
    "train.loggers",
    "train.offload_optimizer",
    "train.validate",
    "scaling",
    "tune",
)

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as plain dicts, lists and scalars, ready for YAML or JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def known_keys(section: type = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of a config, sections included."""
    keys = []
    for name, hint in get_type_hints(section).items():
        keys.append(f"{prefix}{name}")
        inner = section_of(hint)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else []
    return keys


def section_of(hint: Any) -> type | None:
    """Return the dataclass that a field's type names, if any; a list of them is no section."""
    options = () if get_origin(hint) is tuple else (hint, *get_args(hint))
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def unknown_key_message(key: str, known: list[str]) -> str:
    """Return the sentence for a config key that does not exist, with the nearest valid one."""
    every = [k for k in known_keys() if not key.startswith(f"{k}.")]
    leaf = key.rsplit(".", 1)[-1]
    near = [k for k in every if k.rsplit(".", 1)[-1] == leaf][:1]
    near = near or difflib.get_close_matches(key, every, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(known)}."
    return f"config key {key!r} does not exist: {hint}"


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return a copy of `config` with dotted paths set, e.g. {"model.init_args.lr": 0.1}.

    Raises:
        UserError: a path names no field.
    """
    for path, value in overrides.items():
        config = _replace(config, path, path.split("."), value)
    return config


def _replace(section: T, path: str, parts: list[str], value: Any) -> T:
    head, rest = parts[0], parts[1:]
    if isinstance(section, dict):
        inner = _replace(section.get(head, {}), path, rest, value) if rest else value
        return {**section, head: inner}  # type: ignore[return-value]  # T is dict
    fields = _field_names(section)
    if head not in fields:
        prefix = ".".join(path.split(".")[: -len(parts)])
        raise UserError(unknown_key_message(path, [f"{prefix}.{f}".lstrip(".") for f in fields]))
    inner = _replace(getattr(section, head), path, rest, value) if rest else value
    return dataclasses.replace(section, **{head: inner})  # type: ignore[type-var]  # a section


def _field_names(value: object) -> list[str]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [f.name for f in dataclasses.fields(value)]
    return []


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identity(config: Config) -> dict[str, Any]:
    """Return the dotted settings that make a run this run: all but those free to change."""
    flat = flatten(to_dict(config))
    return {k: v for k, v in flat.items() if not f"{k}.".startswith(_FREE_PREFIXES)}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what differs between two identities, in words; empty: nothing.

    A field that `before` does not know yet, as an older version wrote it, had its default.
    """
    defaults = identity(Config())
    before = {**{key: defaults[key] for key in after.keys() & defaults.keys()}, **before}
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if not changed:
        return ""
    key = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"{key} was {before.get(key)!r} and is now {after.get(key)!r}{more}"


_FREE_PREFIXES = tuple(f"{prefix}." for prefix in _FREE_TO_CHANGE)


def config_digest(config: Config) -> str:
    """Return a SHA-256 (hex) of what `identity` returns."""
    canonical = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
