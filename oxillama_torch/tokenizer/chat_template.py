"""Messages to a prompt: the chat template of a file, rendered at arm's length.

The template runs in a process of its own (``template_worker.py``); what users wrote stays marked
through it (``template_marks.py``), so that no message can spell a special token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from oxillama_torch.errors import GGUFError, RequestError, UnsupportedError
from oxillama_torch.tokenizer.template_pool import TemplateLimits, TemplatePool
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "TemplateLimits"]

KEY = "tokenizer.chat_template"
# Names a caller may not set: what the call itself defines, and Jinja's globals.
RESERVED = frozenset(
    ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "template"]
    + ["raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner"]
    + ["namespace", "self", "caller", "loop", "varargs", "kwargs"]
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks are Byzantine musical symbols: printable, so that the Python spelling of a dictionary, which
# some templates write out, shows them as they are; neither letters nor white space; and rare.
_MARKS = [chr(code) for code in range(0x1D000, 0x1D0F6)]
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")


class ChatTemplate:
    """Render conversations for one model.

    Args:
        source: Jinja source, or sources by name: ``default``, and ``tool_use`` for requests with
            tools.
        tokenizer: the model's tokenizer.
        limits: what one rendering may use.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        tokenizer: Tokenizer,
        *,
        limits: TemplateLimits | None = None,
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._tokenizer = tokenizer
        #: Prompts that cannot have so few tokens are refused before they are encoded.
        self.max_tokens: int | None = None
        self._pool = TemplatePool(self._sources, limits or TemplateLimits())
        spellings = {tokenizer.spelling(i) for i in tokenizer.special_ids}
        words = {s for s in spellings if all(c.isalnum() or c.isspace() for c in s)}
        self._telling = _telling_characters(spellings - words)
        # A letter is no telling character: roles and keys are made of letters. The few special
        # tokens that are words are marked where they are written out.
        self._initials = sorted({word[0] for word in words})
        by_length = sorted(words, key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, by_length))) if words else None
        self._takes_parts: dict[str, bool] = {}
        self._takes_objects: dict[str, bool] = {}

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], tokenizer: Tokenizer, *, override: str | None = None
    ) -> ChatTemplate:
        """The template in a file's metadata, or ``override`` instead of it.

        Raises:
            UnsupportedError: the file has no template.
            GGUFError: a template that is not a string.
        """
        if override is not None:
            return cls(override, tokenizer)
        sources = {}
        for key, value in metadata.items():
            if key == KEY or key.startswith(KEY + "."):
                if not isinstance(value, str):
                    raise GGUFError("the chat template is not a string", tensor=key)
                sources[key[len(KEY) + 1 :] or "default"] = value
        if "default" not in sources:
            raise UnsupportedError(
                f"chat with a file that has no {KEY}",
                ["plain completions", "a template given with --chat-template"],
            )
        return cls(sources, tokenizer)

    @property
    def source(self) -> str:
        """The Jinja source used without tools."""
        return self._sources["default"]

    @property
    def tool_source(self) -> str:
        """The Jinja source used with tools."""
        return self._sources.get("tool_use", self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Render to text. Arguments and errors as :meth:`render_ids`."""
        text, marks = self._render(messages, tools, add_generation_prompt, kwargs)
        return text.translate(marks)

    def render_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Render to token ids; the text of messages never becomes a special token.

        The begin token is added where the model wants one and the template wrote none.

        Args:
            messages: as in the chat API. Content of text parts is joined with line breaks where
                the template expects a string; arguments of tool calls are parsed from JSON.
            tools: tool definitions.
            add_generation_prompt: end with the opening of the assistant's turn.
            kwargs: variables for the template, such as ``enable_thinking``,
                ``reasoning_effort`` or ``documents``.

        Raises:
            RequestError: the template failed, refused the messages or ran into a limit (code
                ``template_error``); a variable that may not be set; a part that is not text.
            CapacityError: too many renderings at once.
        """
        tokenizer = self._tokenizer
        if self.max_tokens is not None:
            # Marking, and a process that renders, would take long over what is too long anyway.
            tokenizer.check_fits(_contents(messages), self.max_tokens, "messages")
        text, marks = self._render(messages, tools, add_generation_prompt, kwargs)
        if self.max_tokens is not None:
            tokenizer.check_fits(text, self.max_tokens, "messages")
        ids = tokenizer.encode(text, add_special=False, parse_special=True, stand_ins=marks)
        if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, dict[int, str]]:
        """Render; return the marked text and the table that takes the marks off."""
        for key in variables:
            if key in RESERVED or not re.fullmatch(r"[A-Za-z]\w{0,63}(?<!_token)", key, re.ASCII):
                raise RequestError(
                    f"the template variable {key[:40]!r} may not be set",
                    param=f"chat_template_kwargs.{key[:40]}",
                )
        if tools is not None and not _is_list_of_objects(tools):
            raise RequestError("the tools are not a list of objects", param="tools")
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        given = {
            **variables,
            "messages": self._prepare(messages, name),
            "tools": list(tools) if tools else None,
        }
        try:
            # Nested as deeply as the request to the worker will be.
            written = json.dumps({"request": {"context": given}}, ensure_ascii=False)
            marks = self._choose_marks(name, written)
            given = _map_strings(given, self._marker(marks))
        except (TypeError, ValueError, RecursionError):
            raise _template_error("the messages are not plain JSON, or nested too deeply") from None
        text = self._ask(name, add_generation_prompt, given, marks)
        return text, {ord(mark): char for mark, char in marks.items()}

    def _choose_marks(self, name: str, written: str) -> dict[str, str]:
        """A mark for each character, which neither template nor messages hold."""
        source, wanted = self._sources[name], self._telling + self._initials
        free = (mark for mark in _MARKS if mark not in written and mark not in source)
        marks = dict(zip(free, wanted))
        if len(marks) < len(wanted):
            raise _template_error("the messages hold too many different musical symbols")
        return marks

    def _marker(self, marks: Mapping[str, str]) -> Callable[[str], str]:
        """A function that puts the marks into one string."""
        mark_of = {char: mark for mark, char in marks.items()}
        telling = str.maketrans({char: mark_of[char] for char in self._telling})

        def mark_word(match: re.Match[str]) -> str:
            return mark_of[match[0][0]] + match[0][1:]

        if self._words is None:
            return lambda text: text.translate(telling)
        return lambda text: self._words.sub(mark_word, text.translate(telling))

    def _ask(
        self, name: str, add_generation_prompt: bool, given: dict[str, Any], marks: dict[str, str]
    ) -> str:
        answer = self._pool.render(
            {
                "name": name,
                "context": {
                    "bos_token": "",
                    "eos_token": "",
                    **self._tokenizer.special_tokens,
                    **given,
                    "add_generation_prompt": bool(add_generation_prompt),
                },
                "marks": marks,
                "now": datetime.now().isoformat(),
            }
        )
        if "text" in answer:
            return answer["text"]
        raise _template_error(_explain(answer))

    def _prepare(self, messages: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
        """Bring messages into the form that templates are written for."""
        prepared = []
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise RequestError("a message is not an object", param=f"messages[{i}]")
            message = dict(message)
            if isinstance(message.get("content"), (list, tuple)):
                message["content"] = self._content(message["content"], name, f"messages[{i}]")
            if _is_list_of_objects(calls := message.get("tool_calls")):
                if name not in self._takes_objects:
                    self._takes_objects[name] = self._try_objects(name)
                form = _with_parsed_arguments if self._takes_objects[name] else _with_json_arguments
                message["tool_calls"] = [form(call) for call in calls]
            reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
            if reasoning is not None:
                message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
            prepared.append(message)
        return prepared

    def _content(self, parts: Sequence[Any], name: str, where: str) -> str | list[Any]:
        """Text parts, as they are if the template can take them, else joined to one string."""
        for i, part in enumerate(parts):
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                raise RequestError(
                    "only text parts are supported",
                    code="unsupported_content",
                    param=f"{where}.content[{i}]",
                )
        if name not in self._takes_parts:
            self._takes_parts[name] = self._try_parts(name)
        return list(parts) if self._takes_parts[name] else "\n".join(p["text"] for p in parts)

    def _try_objects(self, name: str) -> bool:
        """Whether the template writes a call's arguments as JSON itself, given an object.

        Some join the JSON text they are given, and fail on an object or write it in Python's
        spelling.
        """
        function = {"name": "probe_of_a_call", "arguments": {"probe": 1}}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        messages = [
            {"role": "user", "content": "probe"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            text = self._ask(name, False, {"messages": messages, "tools": None}, {})
        except RequestError:
            text = "{'probe': 1}"
        if "{'probe': 1}" not in text:
            return True
        function["arguments"] = json.dumps(function["arguments"])
        try:
            return function["arguments"] not in self._ask(
                name, False, {"messages": messages, "tools": None}, {}
            )
        except RequestError:
            return True

    def _try_parts(self, name: str) -> bool:
        """Whether the template shows a text part's text rather than its Python spelling."""
        probe = "probe-of-a-text-part"
        content = [{"type": "text", "text": probe}]
        try:
            messages = [{"role": "user", "content": content}]
            text = self._ask(name, True, {"messages": messages, "tools": None}, {})
        except RequestError:
            return False
        return probe in text and f"'{probe}'" not in text and f'"{probe}"' not in text


def _contents(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of messages and of their parts; of what is no message, nothing."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, Mapping))
        yield from (text for text in texts if isinstance(text, str))


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, Mapping) for v in value)


def _with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool call whose arguments are an object: the API sends them as a JSON string."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _with_json_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool call whose arguments are a JSON text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _telling_characters(spellings: Iterable[str]) -> list[str]:
    """A few characters, neither letters, digits nor spaces, such that every spelling holds one."""
    left = set(spellings)
    telling = []
    while left:
        counts = Counter(c for s in left for c in set(s) if not (c.isalnum() or c.isspace()))
        best = max(counts, key=lambda c: (counts[c], -ord(c)))
        telling.append(best)
        left = {s for s in left if best not in s}
    return telling


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """Apply a function to every string in plain data, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, function): _map_strings(v, function) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(v, function) for v in value]
    return value


def _explain(answer: Mapping[str, Any]) -> str:
    """One line for the caller, without anything of the process it happened in."""
    line = f" (line {answer['line']})" if answer.get("line") else ""
    if answer["error"] == "raised":
        words = "".join(c if c.isprintable() else " " for c in answer["message"])
        return _ADDRESS.sub("0x?", words)[:300]
    return {
        "syntax": f"the chat template is not valid{line}",
        "failed": f"the chat template failed on these messages{line}",
        "time": "the chat template took too long",
        "memory": "the chat template needed too much memory",
        "output": "the chat template wrote too much text",
    }[answer["error"]]


def _template_error(message: str) -> RequestError:
    return RequestError(message, code="template_error", param="messages")
