"""Models whose template knows nothing of tools: the prompt explains them, the reply is JSON.

    {"name": "get_weather", "parameters": {"city": "Oslo"}}

with one line per call. Gemma 2 and 3 are such models; what they have learnt, a fence of
``tool_code`` with Python calls or one of JSON, is read too.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from oxillama_torch.chat.families.base import Family, Message
from oxillama_torch.chat.grammar import Grammar, Thinking, literal
from oxillama_torch.chat.json_reader import call_list, call_object
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Generic"]

_INTRODUCTION = """\
You can call functions. To call one, answer with nothing but a JSON object on one line, with its \
name and its arguments, like this:
{"name": "function_name", "parameters": {"argument": "value"}}
Call several functions with one line each. If no function is needed, answer in plain text.
The functions, with JSON schemas of their parameters:
"""


class Generic(Family):
    name = "generic"

    def messages(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Tools, calls and results become text of the roles that every template has."""
        if not tools and not any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            return list(messages), None
        plain: list[Message] = []
        names: dict[str, str] = {}
        for message in messages:
            names.update(_names(message))
            message = _in_plain_words(message, names)
            if plain and plain[-1]["role"] == message["role"] == "user":
                message["content"] = f"{plain[-1]['content']}\n\n{message['content']}"
                plain.pop()
            plain.append(message)
        if tools:
            _explain(plain, tools)
        return plain, None

    def read(self, reader: Reader, thinking: Thinking | None, calls: bool) -> Program[None]:
        if thinking is not None and thinking.open:
            yield from self.reason(reader, thinking)
        if calls:
            yield from self.read_bare(reader)
        begins = [thinking.begin.text] if thinking is not None else []
        marks = [*begins, "```"] if calls else begins
        while (mark := (yield from reader.until(marks, reader.text))) is not None:
            if mark in begins:
                yield from self.reason(reader, thinking)
                if calls:
                    yield from self.read_bare(reader)
            else:
                yield from reader.attempt(mark, self._fenced(reader))

    def read_bare(self, reader: Reader) -> Program[None]:
        while (yield from reader.attempt("", self.call(reader))):
            yield from reader.take_while(lambda char: char.isspace() or char in ";,")

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        if (yield from reader.peek()) == "[":
            return (yield from call_list(reader))
        return (yield from call_object(reader))

    def _fenced(self, reader: Reader) -> Program[bool]:
        language = yield from reader.take_while(lambda char: char.isalnum() or char == "_")
        if language in ("json", "tool_call"):
            found = yield from self.call(reader)
            yield from reader.space()
            yield from reader.accept("```")
            return found
        if language != "tool_code":
            return False
        held: list[str] = []
        if (yield from reader.until(["```"], held.append)) is None:
            return False
        calls = _python_calls("".join(held))
        if not calls or not all(name in reader.tools for name, _ in calls):
            return False
        for name, arguments in calls:
            reader.start_call(name)
            reader.arguments(arguments)
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        body = grammar.calls(tools, '{"name": "', '", "parameters": ', "}")
        return grammar.several(grammar.rule("call", body), literal("\n"), many)


def _names(message: Message) -> dict[str, str]:
    """Call ids with the names of the functions called."""
    calls = message.get("tool_calls") or []
    return {str(call.get("id")): call["function"]["name"] for call in calls}


def _in_plain_words(message: Message, names: dict[str, str]) -> Message:
    content = _text(message)
    if message["role"] == "tool":
        name = names.get(str(message.get("tool_call_id")), "the function")
        return {"role": "user", "content": f"The result of {name}:\n{content}"}
    if not message.get("tool_calls"):
        return {**message, "content": content}
    lines = [content] if content else []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        name = json.dumps(call["function"]["name"])
        lines.append(f'{{"name": {name}, "parameters": {arguments or "{}"}}}')
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(lines)}


def _text(message: Message) -> str:
    """A message's content as one text."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))


def _explain(messages: list[Message], tools: Sequence[Tool]) -> None:
    """Put the tools into the first message: not every template has a system role."""
    lines = (json.dumps(tool.definition()["function"], ensure_ascii=False) for tool in tools)
    words = _INTRODUCTION + "\n".join(lines)
    if messages[0]["role"] in ("system", "user"):
        messages[0] = {**messages[0], "content": f"{words}\n\n{messages[0]['content']}"}
    else:
        messages.insert(0, {"role": "user", "content": words})


def _python_calls(code: str) -> list[tuple[str, str]]:
    """Names and JSON arguments of the calls in a piece of Python, with or without print()."""
    try:
        body = ast.parse(code.strip()).body
        return [_python_call(statement) for statement in body]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _python_call(statement: ast.stmt) -> tuple[str, str]:
    call = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
        call = call.args[0] if len(call.args) == 1 else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError("not a call of a function with named arguments")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    try:
        return call.func.id, json.dumps(arguments, ensure_ascii=False)
    except TypeError:
        raise ValueError("an argument that JSON cannot hold") from None
