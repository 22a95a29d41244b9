"""Phi 4 mini: tools are a field of the system message, calls a list between markers.

<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from oxillama_torch.chat.families.base import Message
from oxillama_torch.chat.families.lists import Lists
from oxillama_torch.chat.tool import Tool

__all__ = ["Phi"]

_BEGIN, _END = "<|tool_call|>", "<|/tool_call|>"


class Phi(Lists):
    name = "phi"

    def __init__(self, source: str, special_id: Callable[[str], int | None]) -> None:
        # The template does not write calls, so it does not tell their markers.
        super().__init__(f"{source} {_BEGIN} {_END}", special_id)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return "<|tool|>" in source and "message['tools']" in source

    def messages(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Tools go into the system message; calls that were made, into their message's text."""
        messages = [_with_calls_in_text(message) for message in messages]
        if tools:
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": ""})
            functions = [tool.definition()["function"] for tool in tools]
            messages[0] = {**messages[0], "tools": json.dumps(functions, ensure_ascii=False)}
        return messages, None


def _with_calls_in_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {"name": call["function"]["name"], "arguments": _parsed(call["function"]["arguments"])}
        for call in message["tool_calls"]
    ]
    return {**message, "content": f"{message.get('content') or ''}{json.dumps(calls)}"}


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
