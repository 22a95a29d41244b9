"""What a route takes and gives, read off its own code: a description kept by hand would go stale.

A view is parsed, and with it the functions of this package that it calls by name: there one sees
which pydantic model the body is validated with, which query parameters are asked for, whether the
answer can be a stream, and its status.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from pydantic import BaseModel, TypeAdapter

from oxillama_torch.server.listing import list_query

__all__ = ["Reading", "read_view", "summary_of"]

_PACKAGE = "oxillama_torch.server"
_DEPTH = 3
_BODY_READERS = ("json_body", "json_array")
_STREAMERS = ("answer", "stream_frames")


@dataclass(slots=True)
class Reading:
    """What was found.

    Args:
        bodies: the model (or TypeAdapter) that validates the JSON body; at most one.
        form: the model of the fields of an uploaded form.
        optional_body: whether the body may be missing.
        queries: models of the query.
        parameters: further parameters of the query, by name.
        most: of a list at once.
        statuses: of answers that are no errors.
        streams: whether the answer may be a stream of events.
        mimetypes: of answers that are not JSON.
    """

    bodies: list[Any] = field(default_factory=list)
    form: type[BaseModel] | None = None
    optional_body: bool = False
    queries: list[type[BaseModel]] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    most: int | None = None
    statuses: set[int] = field(default_factory=set)
    streams: bool = False
    mimetypes: list[str] = field(default_factory=list)


def read_view(view: Callable) -> Reading:
    """Read one view function."""
    reading = Reading()
    seen: set[Callable] = set()
    _read(view, reading, seen, 0)
    reading.statuses |= _statuses(_tree(view))
    return reading


def _read(function: Callable, reading: Reading, seen: set[Callable], depth: int) -> None:
    if function in seen or depth > _DEPTH:
        return
    seen.add(function)
    names = _names(function)
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.IfExp) and "content_length" in ast.dump(node.test):
            reading.optional_body = True  # what is done without a body
        if not isinstance(node, ast.Call):
            continue
        _read_call(node, names, reading)
        called = _object(node.func, names)
        if isinstance(called, FunctionType) and called.__module__.startswith(_PACKAGE):
            if called is list_query:
                reading.most = _most(node, names)
            if called.__name__ in _STREAMERS:
                reading.streams = reading.streams or _may_stream(node)
            elif called.__name__ not in _BODY_READERS:
                _read_model_argument(node, called, names, reading)
                _read(called, reading, seen, depth + 1)


def _read_call(node: ast.Call, names: dict[str, Any], reading: Reading) -> None:
    """``Model.validate(json_body())``, ``Query.model_validate(request.args...)``, ``args.get``."""
    for keyword in node.keywords:
        if keyword.arg in ("mimetype", "content_type"):
            _add_mimetype(_object(keyword.value, names), reading)
    if not isinstance(node.func, ast.Attribute):
        return
    owner = _object(node.func.value, names)
    inside = [_called_name(n) for arg in node.args for n in ast.walk(arg)]
    if isinstance(owner, type) and issubclass(owner, BaseModel):
        if any(name in _BODY_READERS for name in inside):
            reading.bodies.append(owner)
        elif any("request.args" in ast.unparse(arg) for arg in node.args):
            reading.queries.append(owner)
        elif node.func.attr == "model_validate" and owner.__name__.endswith("Form"):
            reading.form = owner
    elif isinstance(owner, TypeAdapter) and any(name in _BODY_READERS for name in inside):
        reading.bodies.append(owner)
    elif ast.unparse(node.func) == "request.args.get" and isinstance(node.args[0], ast.Constant):
        reading.parameters.append(node.args[0].value)


def _read_model_argument(
    node: ast.Call, called: FunctionType, names: dict[str, Any], reading: Reading
) -> None:
    """A model that is handed to a function, which validates the body with it."""
    dumped = ast.dump(_tree(called))
    for arg in node.args:
        found = _object(arg, names)
        if isinstance(found, type) and issubclass(found, BaseModel) and "'json_body'" in dumped:
            reading.bodies.append(found)
        if isinstance(found, str) and "mimetype" in called.__code__.co_varnames and "/" in found:
            _add_mimetype(found, reading)


def _most(node: ast.Call, names: dict[str, Any]) -> int:
    """What ``list_query`` is told, else its own."""
    given = inspect.signature(list_query).parameters["most"].default
    return _object(node.args[1], names) if len(node.args) > 1 else given


def _add_mimetype(found: Any, reading: Reading) -> None:
    if isinstance(found, str) and not found.startswith("application/json"):
        reading.mimetypes.append(found.partition(";")[0])


def _may_stream(node: ast.Call) -> bool:
    if _called_name(node) == "stream_frames":
        return True
    stream = next((k.value for k in node.keywords if k.arg == "stream"), None)
    return not (isinstance(stream, ast.Constant) and stream.value is False)


def _statuses(tree: ast.AST) -> set[int]:
    """``return answer, 201``; without such, 200."""
    found = {
        item.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        for item in ast.walk(node.value.elts[-1])
        if isinstance(item, ast.Constant) and isinstance(item.value, int) and item.value < 400
    }
    return found or {200}


def _called_name(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _object(node: ast.AST, names: dict[str, Any]) -> Any:
    """What a name or a constant stands for, or None."""
    if isinstance(node, ast.Constant):
        return node.value
    return names.get(node.id) if isinstance(node, ast.Name) else None


def _names(function: Callable) -> dict[str, Any]:
    function = inspect.unwrap(function)
    closure = inspect.getclosurevars(function).nonlocals
    return {**function.__globals__, **closure}


@functools.cache
def _tree(function: Callable) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def summary_of(view: Callable) -> str:
    """What the module of a view says of itself, in a line."""
    module = inspect.getmodule(inspect.unwrap(view))
    return (module.__doc__ or "").partition("\n")[0]
