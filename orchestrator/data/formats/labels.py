"""Raw labels (text, numbers, lists) -> what shards hold. Pure.

A *kind* is one class, several classes, a number, or no label. Classes are numbers in the source, or
names: then `classes` says which number each has.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from orchestrator.config import UserError
from orchestrator.data.index import LabelKind

Label = int | float | tuple[int, ...] | None
KINDS: tuple[LabelKind, ...] = ("class", "multi", "float", "none")
# More names than any label set has: these are captions.
MAX_CLASSES = 1_000_000
_INT32 = 1 << 31
# Not `007`, which as a number would be the same class as `7`: padded numbers are names.
_WHOLE_TEXT = re.compile(r"-?(0|[1-9][0-9]*)")
_PADDED_TEXT = re.compile(r"0[0-9]+")


class BadLabel(ValueError):
    """A label that does not fit its kind: the sample is left out."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """How a raw label becomes a label of a shard."""

    kind: LabelKind
    column: str = ""
    """Where it lies: a column, or a tar member's extension, or `json:field`."""
    named: bool = False
    """Whether the source calls classes by name."""
    classes: tuple[str, ...] = ()
    """Names by number, once they are known."""
    fixed: bool = False
    """Whether the user listed the classes, so that another one is a mistake."""

    @functools.cached_property
    def _number_of(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what decides a label."""
        text = repr(dataclasses.astuple(self))
        return str(xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass")))

    def names(self, raw: object) -> list[str]:
        """Return the class names that a raw label holds: none where classes are numbers.

        Raises:
            BadLabel: there is no label.
        """
        if not self.named:
            return []
        return [_name(value) for value in (_list(raw) if self.kind == "multi" else [raw])]

    def parse(self, raw: object) -> Label:
        """Return a raw label as shards hold it.

        Raises:
            BadLabel: it does not fit the kind.
            UserError: it is none of the classes that the user listed.
        """
        if self.kind == "none":
            return None
        if self.kind == "float":
            return _number(raw)
        if self.kind == "class":
            return self._class(raw)
        classes = [self._class(value) for value in _list(raw)]
        if len(set(classes)) < len(classes):
            raise BadLabel(
                f"bad_label: {_shown(raw)} names a class twice; one-hot lists are not read"
            )
        return tuple(sorted(classes))

    def _class(self, raw: object) -> int:
        if not self.named:
            number = _integer(raw)
            if self.fixed and number >= len(self.classes):
                raise UserError(
                    f"label {number} is outside the {len(self.classes)} classes of --classes; "
                    "mend the label or the list."
                )
            return number
        name = _name(raw)
        if name not in self._number_of:
            raise UserError(
                f"label {_shown(name)} is none of the {len(self.classes)} known classes; add it to "
                "--classes or mend it."
            )
        return self._number_of[name]


def infer(values: Iterable[object], *, classes: Sequence[str] = ()) -> tuple[LabelKind, bool]:
    """Return the kind of some raw labels, and whether classes are names.

    Whole numbers are classes, other numbers targets, lists several classes, other text names. Only
    text may be one of `classes`: a number among them is a place, whatever they are called.
    """
    found = [value for value in values if value is not None and value != ""]
    if not found:
        return "none", False
    if all(_is_list(value) for value in found):
        inner = [item for value in found for item in _list(value)]
        return "multi", infer(inner, classes=classes)[1]
    texts = {value.strip() for value in found if isinstance(value, str)}
    if texts & set(classes) or any(map(_PADDED_TEXT.fullmatch, texts)):
        return "class", True
    if all(_fits(_whole, value) for value in found):
        return "class", False
    if all(_fits(_number, value) for value in found):
        return "float", False
    return "class", True


def is_named(kind: LabelKind, values: Iterable[object], classes: Sequence[str]) -> bool:
    """Return whether labels of a kind that the user named are class names.

    Raises:
        BadLabel: there shall be several classes, but a label is no list.
    """
    if kind not in ("class", "multi"):
        return False
    given = (value for value in values if value is not None and value != "")
    found = [item for value in given for item in (_list(value) if kind == "multi" else [value])]
    return infer(found, classes=classes) != ("class", False)


def _is_list(value: object) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    return isinstance(value, (list, tuple))


def _list(raw: object) -> list[Any]:
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadLabel(f"bad_label: {_shown(raw)} is no JSON list") from error
    if isinstance(raw, (list, tuple)):
        return list(raw)
    raise BadLabel(f"bad_label: {_shown(raw)} is no list of classes")


def _whole(raw: object) -> int:
    try:
        if isinstance(raw, str) and not _WHOLE_TEXT.fullmatch(raw.strip()):
            raise ValueError
        # What is no number raises, which is caught below.
        number = int(raw)  # type: ignore[call-overload]
        if not isinstance(raw, str) and raw != number:  # a Decimal, a fraction
            raise ValueError
        return int(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadLabel(f"bad_label: {_shown(raw)} is no class index") from error


def _integer(raw: object) -> int:
    number = _whole(raw)
    if not 0 <= number < _INT32:
        raise BadLabel(f"bad_label: {_shown(raw)} is no class index (0, 1, 2, ...)")
    return number


def _number(raw: object) -> float:
    try:
        if isinstance(raw, str) and "_" in raw:  # Python reads 1_1 as 11
            raise ValueError
        number = float(raw)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError, OverflowError) as error:
        raise BadLabel(f"bad_label: {_shown(raw)} is no number") from error
    if not math.isfinite(number):
        raise BadLabel(f"bad_label: {_shown(raw)} is not finite")
    return number


def _name(raw: object) -> str:
    name = "" if raw is None or isinstance(raw, (list, dict)) else str(raw).strip()
    if not name:
        raise BadLabel("no_label: the sample has none")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadLabel(f"bad_label: {_shown(raw)} is not UTF-8") from error
    return name


def _fits(read: Any, value: object) -> bool:
    try:
        read(value)
    except BadLabel:
        return False
    return True


def _shown(raw: object) -> str:
    text = ascii(raw)
    return text if len(text) <= 60 else f"{text[:57]}..."
