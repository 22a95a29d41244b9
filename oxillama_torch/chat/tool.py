"""What a model may call: plain data that every front door shares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oxillama_torch.chat.schema import check_object, check_strict
from oxillama_torch.errors import RequestError

__all__ = ["Tool", "ToolCall", "ToolChoice", "tools_from"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST_TOOLS = 128
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask the client to call.

    Args:
        name: 1 to 64 characters of ``[a-zA-Z0-9_-]``.
        description: for the model; may be empty.
        parameters: JSON schema of the arguments, an object; None: any object.
        strict: the schema has been checked to be one that is enforced to the letter.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments: always of an object."""
        return {**_ANY_OBJECT, **(self.parameters or {})}

    def definition(self) -> dict[str, Any]:
        """The tool as chat templates want it."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        function["parameters"] = self.parameters or {**_ANY_OBJECT, "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model has made.

    Args:
        id: what its result has to name.
        name: the tool.
        arguments: JSON text, as the model wrote it.
    """

    id: str
    name: str
    arguments: str


def tools_from(definitions: Sequence[Any], param: str = "tools") -> tuple[Tool, ...]:
    """Tools as the API has them: ``{"type": "function", "function": {...}}``, or flat.

    A Tool stays what it is.

    Raises:
        RequestError: names the field that is wrong; two tools of one name; other kinds of tools.
    """
    if len(definitions) > _MOST_TOOLS:
        raise RequestError(f"at most {_MOST_TOOLS} tools", param=param)
    tools = tuple(_tool(item, f"{param}[{i}]") for i, item in enumerate(definitions))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(f"two tools are called {name!r}", param=f"{param}[{i}]")
    return tools


def _tool(item: Any, param: str) -> Tool:
    if isinstance(item, Tool):
        return item
    if not isinstance(item, Mapping):
        raise RequestError("a tool is an object", param=param, code="invalid_type")
    if item.get("type", "function") != "function":
        raise RequestError(
            f"tools of type {str(item['type'])[:40]!r} are not supported, only functions",
            param=f"{param}.type",
            code="unsupported_parameter",
        )
    if "function" in item:
        item, param = item["function"], f"{param}.function"
        if not isinstance(item, Mapping):
            raise RequestError("a function is an object", param=param, code="invalid_type")
    name, description = item.get("name"), item.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            "a name has 1 to 64 letters, digits, underscores and hyphens", param=f"{param}.name"
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(
            "a description is a string", param=f"{param}.description", code="invalid_type"
        )
    parameters, strict = item.get("parameters"), item.get("strict") is True
    if parameters is not None:
        check_object(parameters, f"{param}.parameters")
    if strict:
        check_strict({**_ANY_OBJECT, **(parameters or {})}, f"{param}.parameters")
    return Tool(name=name, description=description or "", parameters=parameters, strict=strict)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model must call, and what.

    Args:
        mode: ``none``, ``auto`` or ``required``.
        names: what may be called; None: any of the tools.
        once: one call is wanted, as where a function is named.
    """

    mode: str = "auto"
    names: frozenset[str] | None = None
    once: bool = False

    @classmethod
    def of(cls, value: Any, tools: Sequence[Tool], param: str = "tool_choice") -> ToolChoice:
        """The choice that the API's value stands for.

        Args:
            value: ``none``, ``auto``, ``required``, ``=NAME``; ``{"type": "function", ...}`` or
                ``{"type": "allowed_tools", ...}``, nested or flat; None: auto.

        Raises:
            RequestError: something else, or a tool that is not there.
        """
        if value is None:
            value = "auto"
        if value in ("none", "auto"):
            return cls(value)
        if value == "required":
            choice = cls("required")
        elif isinstance(value, str) and value.startswith("="):
            choice = cls("required", frozenset([value[1:]]), once=True)
        elif isinstance(value, Mapping) and value.get("type") == "function":
            choice = cls("required", frozenset([_named(value, param)]), once=True)
        elif isinstance(value, Mapping) and value.get("type") == "allowed_tools":
            choice = cls._allowed(value.get("allowed_tools", value), f"{param}.allowed_tools")
        else:
            raise RequestError(
                "one of none, auto, required, a function or allowed tools", param=param
            )
        choice._check(tools, param)
        return choice

    @classmethod
    def _allowed(cls, value: Any, param: str) -> ToolChoice:
        if not isinstance(value, Mapping) or value.get("mode") not in ("auto", "required"):
            raise RequestError("the mode is auto or required", param=f"{param}.mode")
        items = value.get("tools")
        if not isinstance(items, list) or not items:
            raise RequestError("a list of tools", param=f"{param}.tools")
        names = (_named(item, f"{param}.tools[{i}]") for i, item in enumerate(items))
        return cls(value["mode"], frozenset(names))

    def _check(self, tools: Sequence[Tool], param: str) -> None:
        if not tools:
            raise RequestError("there are no tools to choose from", param=param)
        missing = (self.names or frozenset()) - {tool.name for tool in tools}
        if missing:
            raise RequestError(f"there is no tool {min(missing)[:64]!r}", param=param)

    def pick(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """Those of ``tools`` that may be called."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in tools if self.names is None or tool.name in self.names)


def _named(value: Any, param: str) -> str:
    if isinstance(value, Mapping):
        function = value.get("function", value)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return function["name"]
    raise RequestError("a function's name is wanted", param=param)
