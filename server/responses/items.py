"""Items of responses and conversations: checked, put into their full form, turned into messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from oxillama_torch.errors import RequestError
from oxillama_torch.server.errors import from_validation
from oxillama_torch.server.http import new_id
from oxillama_torch.server.schemas.common import StrictModel
from oxillama_torch.server.store.paging import not_found

__all__ = ["Item", "item_id", "items_page", "list_of", "messages_of", "parse_items"]

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=256)]


def item_id(prefix: str) -> str:
    """A random id such as ``msg_...``."""
    return new_id(prefix).replace("-", "_", 1)


class _Part(StrictModel):
    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None

    def value(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


class _Message(StrictModel):
    PREFIX: ClassVar[str] = "msg"

    type: Literal["message"] | None = None
    id: Id | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_Part]

    def full(self) -> dict[str, Any]:
        parts = self.content if isinstance(self.content, list) else [self.content]
        make = _output_part if self.role == "assistant" else _input_part
        content = [make(part) for part in parts]
        return {"type": "message", "role": self.role, "status": "completed", "content": content}


def _input_part(part: _Part | str) -> dict[str, Any]:
    return {"type": "input_text", "text": part if isinstance(part, str) else part.value()}


def _output_part(part: _Part | str) -> dict[str, Any]:
    if isinstance(part, _Part) and part.type == "refusal":
        return {"type": "refusal", "refusal": part.value()}
    text = part if isinstance(part, str) else part.value()
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _FunctionCall(StrictModel):
    PREFIX: ClassVar[str] = "fc"

    type: Literal["function_call"]
    id: Id | None = None
    call_id: str
    name: str
    arguments: str

    def full(self) -> dict[str, Any]:
        return {
            "type": "function_call",
            "status": "completed",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class _FunctionCallOutput(StrictModel):
    PREFIX: ClassVar[str] = "fco"

    type: Literal["function_call_output"]
    id: Id | None = None
    call_id: str
    output: str | list[_Part]

    def full(self) -> dict[str, Any]:
        output = self.output
        if isinstance(output, list):
            output = [_input_part(part) for part in output]
        return {
            "type": "function_call_output",
            "status": "completed",
            "call_id": self.call_id,
            "output": output,
        }


class _Reasoning(StrictModel):
    PREFIX: ClassVar[str] = "rs"

    type: Literal["reasoning"]
    id: Id | None = None
    summary: list[_Part] = []
    content: list[_Part] | None = None

    def full(self) -> dict[str, Any]:
        summary = [{"type": "summary_text", "text": part.value()} for part in self.summary]
        content = [{"type": "reasoning_text", "text": p.value()} for p in self.content or ()]
        return {"type": "reasoning", "summary": summary, "content": content}


class _Reference(StrictModel):
    type: Literal["item_reference"] | None = None
    id: Id


class _AnyItem:
    """Describes an object as any of the models, of which its type says which it is read with."""

    def __get_pydantic_json_schema__(self, _schema: Any, handler: Callable) -> dict[str, Any]:
        kinds = _Message | _FunctionCall | _FunctionCallOutput | _Reasoning | _Reference
        return handler(TypeAdapter(kinds).core_schema)


Item = Annotated[dict[str, Any], _AnyItem()]

_KINDS: dict[str, type[StrictModel]] = {
    "message": _Message,
    "function_call": _FunctionCall,
    "function_call_output": _FunctionCallOutput,
    "reasoning": _Reasoning,
}


def parse_items(
    items: Iterable[dict[str, Any]], param: str, find: Callable[[str], dict | None]
) -> list[dict[str, Any]]:
    """Items in their full form, each with an id.

    Args:
        items: as a client sent them.
        param: where they stand in the body, for messages.
        find: the stored item that an ``item_reference`` names, or None.

    Raises:
        RequestError: an item that is malformed, unknown, or not text.
    """
    return [_parse(item, f"{param}[{index}]", find) for index, item in enumerate(items)]


def _parse(item: dict[str, Any], param: str, find: Callable[[str], dict | None]) -> dict[str, Any]:
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference"
    try:
        if kind == "item_reference":
            return _referenced(_Reference.model_validate(item).id, param, find)
        if not isinstance(kind, str) or kind not in _KINDS:
            known = ", ".join([*_KINDS, "item_reference"])
            raise RequestError(
                f"Items of type {str(kind)[:64]!r} are not supported; supported: {known}.",
                code="unsupported_value",
                param=f"{param}.type",
            )
        parsed = _KINDS[kind].model_validate(item)
    except ValidationError as error:
        problem = from_validation(error)
        raise RequestError(
            problem.message, code=problem.code, param=f"{param}.{problem.param or 'type'}"
        ) from None
    return {"id": parsed.id or item_id(parsed.PREFIX), **parsed.full()}


def _referenced(name: str, param: str, find: Callable[[str], dict | None]) -> dict[str, Any]:
    found = find(name)
    if found is None:
        raise RequestError(
            f"Item with id '{name}' not found.", status=404, code="not_found", param=f"{param}.id"
        )
    return found


def text_of(item: dict[str, Any]) -> str:
    """The text of an item's parts."""
    content = item.get("content") or item.get("output") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


def messages_of(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as chat templates know them: one assistant message for what one turn said and called.

    Raises:
        RequestError: a function's output without its call, or a call without its output.
    """
    messages: list[dict[str, Any]] = []
    calls: dict[str, bool] = {}
    for item in items:
        _add(messages, calls, item)
    for call_id, answered in calls.items():
        if not answered:
            raise _unmatched(f"No tool output found for function call {call_id}.")
    return messages


def _add(messages: list[dict], calls: dict[str, bool], item: dict[str, Any]) -> None:
    kind = item["type"]
    if kind == "function_call_output":
        if item["call_id"] not in calls:
            raise _unmatched(f"No tool call found for function call output {item['call_id']}.")
        calls[item["call_id"]] = True
        message = {"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item)}
        messages.append(message)
    elif kind == "function_call":
        calls[item["call_id"]] = False
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        if text := text_of(item):
            _assistant(messages)["reasoning_content"] = text
    elif item["role"] == "assistant":
        _assistant(messages)["content"] += text_of(item)
    else:
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": text_of(item)})


def _assistant(messages: list[dict]) -> dict[str, Any]:
    """The assistant message that is being said."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _unmatched(message: str) -> RequestError:
    return RequestError(message, param="input")


def items_page(
    items: list[dict[str, Any]],
    *,
    limit: int,
    order: str,
    after: str | None = None,
    before: str | None = None,
) -> dict[str, Any]:
    """One page of a list of items.

    Raises:
        RequestError: a cursor names no item of the list.
    """
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    for name, cursor in (("after", after), ("before", before)):
        if cursor is not None and cursor not in ids:
            raise not_found("item of this list", cursor, name)
    start = 0 if after is None else ids.index(after) + 1
    stop = len(ids) if before is None else ids.index(before)
    return list_of(items[start:stop][:limit], stop - start > limit)


def list_of(items: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """The list object of items; its cursors are texts even where there is none."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else "",
        "last_id": items[-1]["id"] if items else "",
        "has_more": has_more,
    }
