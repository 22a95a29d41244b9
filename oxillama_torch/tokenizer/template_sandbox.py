"""The Jinja environment chat templates run in: transformers' rules, plus marks.

The rules (blocks trimmed, loop controls, ``tojson`` without HTML escapes, ``raise_exception``,
``strftime_now``, ``{% generation %}``, no private names in a namespace) are those of
``transformers.utils.chat_template_utils``, which itself takes over a second to import.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, markupsafe
from jinja2.visitor import NodeTransformer

from oxillama_torch.tokenizer.template_marks import Marks

__all__ = ["RaisedByTemplate", "TemplateEnvironment"]


class RaisedByTemplate(TemplateError):
    """A template called ``raise_exception``: its message is meant for the caller."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compile and render chat templates.

    Attributes:
        marks: the marks in the texts of the rendering under way.
        now: what ``strftime_now`` tells.
    """

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.marks = Marks({})
        self.now = datetime.now()
        self.filters |= {"tojson": _tojson, "replace": _replace, "trim": _trim}
        self.filters |= dict.fromkeys(("e", "escape", "forceescape"), _escape)
        for operation, names in _COMPARISON_TESTS.items():
            self.tests |= dict.fromkeys(names, _comparison_test(operation))
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: self.now.strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _MarkedComparisons().visit(super()._parse(source, name, filename))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something for a template; methods of strings see through marks."""
        if type(__obj) is types.BuiltinMethodType and type(__obj.__self__) is str:
            for name in ("_loop_vars", "_block_vars"):  # Jinja's own; str takes no such thing
                kwargs.pop(name, None)
            return __self.marks.call(__obj.__self__, __obj.__name__, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def compare(self, operation: str, left: Any, right: Any) -> bool:
        """``==``, ``!=``, ``in`` and ``not in`` as templates see them."""
        return self.marks.compare(operation, left, right)


class _MarkedComparisons(NodeTransformer):
    """Send simple comparisons through ``TemplateEnvironment.compare``."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) != 1 or node.ops[0].op not in ("eq", "ne", "in", "notin"):
            return node
        args = [nodes.Const(node.ops[0].op), node.expr, node.ops[0].expr]
        call = nodes.Call(nodes.EnvironmentAttribute("compare"), args, [], None, None)
        return call.set_lineno(node.lineno).set_environment(node.environment)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: marks what a model is trained on; shows it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """``dict`` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace that takes no private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # namespace(self=...) is allowed
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace takes no names that start with an underscore")


def _raise_exception(message: Any) -> None:
    raise RaisedByTemplate(str(message))


@pass_environment
def _tojson(
    env: TemplateEnvironment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, indent=indent, separators=separators, sort_keys=sort_keys, ensure_ascii=ensure_ascii
    )
    for mark in env.marks.marks if ensure_ascii else ():
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


@pass_environment
def _replace(
    env: TemplateEnvironment, value: Any, old: str, new: str, count: int | None = None
) -> str:
    return env.marks.call(str(value), "replace", str(old), str(new), -1 if count is None else count)


@pass_environment
def _trim(env: TemplateEnvironment, value: Any, chars: str | None = None) -> str:
    return env.marks.call(str(value), "strip", chars)


@pass_environment
def _escape(env: TemplateEnvironment, value: Any) -> str:
    """HTML escapes. An escaped character spells no special token, so its mark can go."""
    text = str(value)
    escapes = {ord(c): str(markupsafe.escape(env.marks.plain(c))) for c in set(text)}
    return text.translate({code: e for code, e in escapes.items() if len(e) > 1})


_COMPARISON_TESTS: Mapping[str, tuple[str, ...]] = {
    "eq": ("eq", "==", "equalto"),
    "ne": ("ne", "!="),
    "in": ("in",),
}


def _comparison_test(operation: str) -> Any:
    @pass_environment
    def test(env: TemplateEnvironment, left: Any, right: Any) -> bool:
        return env.compare(operation, left, right)

    return test
