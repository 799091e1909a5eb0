"""Driver side: whether the metric that early stopping watches is ever logged, before a start.

Known for `ImageClassifier`, and for modules whose source names all that they log. Of the others it
shows at their first validation.
"""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Collection, Iterator

import pytorch_lightning as pl

from orchestrator.config import Config, UserError
from orchestrator.train.model import find_class
from orchestrator.train.module import CLASSIFIER_METRICS, ImageClassifier

_LOG = ("log", "log_dict")
# What leaves a method as it is.
_DECORATORS = {"override", "property", "torch.inference_mode()", "torch.no_grad()"}
_WITHOUT_SELF = {"classmethod", "staticmethod"}
# Lightning adds these where a metric is logged both of each batch and of the whole.
_SUFFIXES = ("_epoch", "_step")


def check(config: Config) -> None:
    """Hold what is to be validated against what the module validates.

    Raises:
        UserError: it validates nothing, or never logs the metric that early stopping watches.
    """
    path, rule = config.model.class_path, config.train.early_stopping
    found = find_class(path)
    if found.validation_step is pl.LightningModule.validation_step:
        _refuse_validation(config)
    known = _known(found, beside=config.train.validate.beside is not None)
    if rule is None or known is None:
        return
    if not {rule.monitor, *(rule.monitor.removesuffix(s) for s in _SUFFIXES)} & set(known):
        near = difflib.get_close_matches(rule.monitor, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name what its validation_step logs."
        raise UserError(
            f"train.early_stopping.monitor={rule.monitor!r} is never logged: {path} logs "
            f"{', '.join(known) or 'nothing'}; {hint}"
        )


def _refuse_validation(config: Config) -> None:
    validate = config.train.validate
    for key, value in (
        ("train.early_stopping", config.train.early_stopping),
        ("train.validate.every_samples", validate.every_samples),
        ("train.validate.beside", validate.beside),
    ):
        if value is not None:
            raise UserError(
                f"{key} needs validations but model.class_path={config.model.class_path!r} has no "
                f"validation_step; write one, or set {key} to null."
            )


def _known(found: type[pl.LightningModule], *, beside: bool) -> Collection[str] | None:
    if found is ImageClassifier:
        # Beside training there is no training step to log anything.
        return [name for name in CLASSIFIER_METRICS if not (beside and name == "train_loss")]
    return logged_names(found)


def logged_names(found: type[pl.LightningModule]) -> list[str] | None:
    """Return the names of all metrics that a module can log; None: its source does not say."""
    names: set[str] = set()
    for part in found.__mro__:
        if part not in pl.LightningModule.__mro__:
            try:
                names.update(_names(part))
            except (_Unknown, OSError, TypeError, SyntaxError):  # or its source is nowhere
                return None
    return sorted(names)


class _Unknown(Exception):
    """A class may log what its source does not name."""


def _names(part: type) -> Iterator[str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    if not isinstance(tree, ast.ClassDef) or tree.decorator_list:
        raise _Unknown
    for node in tree.body:
        _check_member(node)
    nodes = list(ast.walk(tree))
    calls = [n for n in nodes if isinstance(n, ast.Call) and _logs(n.func)]
    used = [n.value for n in nodes if isinstance(n, ast.Attribute)]
    used += [n.func for n in nodes if isinstance(n, ast.Call)]
    handed_on = sum(_is_self(n) for n in nodes) - sum(_is_self(n) for n in used)
    if handed_on or sum(_logs(n) for n in nodes) > len(calls):
        raise _Unknown  # whoever gets the module, or its `log`, may log
    for call in calls:
        yield from _names_in(call)


def _check_member(node: ast.stmt) -> None:
    """Refuse members of a class that may come from elsewhere, or know it by another name."""
    if isinstance(node, ast.FunctionDef):
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        arguments = [a.arg for a in node.args.posonlyargs + node.args.args]
        named = arguments[:1] == ["self"] or decorators & _WITHOUT_SELF
        known = decorators <= _DECORATORS | _WITHOUT_SELF
        if not (named and known) or node.name in (*_LOG, "configure_callbacks"):
            raise _Unknown
        return
    value = getattr(node, "value", None)
    plain = isinstance(node, ast.AnnAssign | ast.Assign | ast.Expr | ast.Pass)
    if not plain or not isinstance(value, ast.Constant | ast.Tuple | None):
        raise _Unknown


def _logs(node: ast.AST) -> bool:
    """Return whether an expression is `log` or `log_dict` of the module."""
    if not isinstance(node, ast.Attribute) or node.attr not in _LOG:
        return False
    return not isinstance(node.value, ast.Name) or _is_self(node.value)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _names_in(call: ast.Call) -> Iterator[str]:
    assert isinstance(call.func, ast.Attribute)
    named = [k.value for k in call.keywords if k.arg in ("name", "dictionary")]
    names: list[ast.expr | None] = [*call.args, *named, None][:1]
    if call.func.attr == "log_dict":
        names = [key for n in names if isinstance(n, ast.Dict) for key in n.keys] or [None]
    for name in names:
        if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
            raise _Unknown
        yield name.value
