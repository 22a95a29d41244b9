"""From token ids to the parts of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Thinking
from oxillama_torch.chat.parts import CallArguments, CallStarted, Part, Text, Thought
from oxillama_torch.chat.reader import Reader
from oxillama_torch.chat.tool import Tool, ToolCall
from oxillama_torch.tokenizer.detokenizer import Detokenizer
from oxillama_torch.tokenizer.text_stream import TextStream
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Assembly", "PlainReply", "Reply", "ReplyFormat"]


class PlainReply:
    """A reply that is nothing but text.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end the text.

    Attributes:
        calls: number of calls so far.
        reasoning_tokens: how many of the tokens were reasoning.
        joins: whether no text ends it, so that several tokens may be taken at once.
        push_all: takes several tokens of a reply that ``joins``; returns the text that became
            certain with them.
    """

    __slots__ = ("_stream", "joins", "push_all")

    calls = 0
    reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._stream = TextStream(tokenizer, stop)
        self.joins = not stop
        self.push_all = self._stream.push_all

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stream.finished is not None

    @property
    def stop_word(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stream.finished

    def push(self, token_id: int) -> Sequence[Part]:
        """Take one token; return what became certain with it."""
        text = self._stream.push(token_id)
        return (Text(text),) if text else ()

    def flush(self) -> Sequence[Part]:
        """End the reply; return what was held back."""
        text = self._stream.flush()
        return (Text(text),) if text else ()


class Reply:
    """A reply with reasoning or tool calls; arguments and methods as ``PlainReply``.

    Args:
        reply_format: how it is written.
    """

    joins = False

    def __init__(
        self, tokenizer: Tokenizer, reply_format: ReplyFormat, stop: tuple[str, ...] = ()
    ) -> None:
        family, thinking, tools = reply_format.family, reply_format.thinking, reply_format.tools
        markers = family.markers(bool(tools))
        if thinking is not None:
            markers += [thinking.begin, thinking.end]
        self._markers = {m.token_id: m.text for m in markers if m.token_id is not None}
        self._detokenizer = Detokenizer(tokenizer, skip_special=True)
        self._reader = Reader(
            lambda reader: family.read(reader, thinking, bool(tools)),
            tools={tool.name: tool for tool in tools},
            stop=stop,
            new_id=family.new_id,
        )
        self._reader.push("")  # now it knows whether it begins with reasoning
        self.reasoning_tokens = 0

    @property
    def calls(self) -> int:
        """Number of calls so far."""
        return self._reader.calls

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._reader.stopped

    def push(self, token_id: int) -> Sequence[Part]:
        """Take one token; return what became certain with it."""
        marker = self._markers.get(token_id)
        text = self._detokenizer.push(token_id) if marker is None else marker
        thinking = self._reader.thinking
        parts = self._reader.push(text) if text else ()
        self.reasoning_tokens += thinking or self._reader.thinking
        return parts

    def flush(self) -> Sequence[Part]:
        """End the reply; return what was held back."""
        parts = self._reader.push(self._detokenizer.flush())
        return [*parts, *self._reader.end()]


class Assembly:
    """The parts of a reply put together.

    Attributes:
        text: the answer.
        reasoning: the reasoning; empty without any.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[CallStarted, list[str]]] = []

    def add(self, parts: Sequence[Part]) -> str:
        """Take further parts; return what they add to the answer."""
        new = "".join(part.text for part in parts if isinstance(part, Text))
        self._text.append(new)
        for part in parts:
            if isinstance(part, Thought):
                self._reasoning.append(part.text)
            elif isinstance(part, CallStarted):
                self._calls.append((part, []))
            elif isinstance(part, CallArguments):
                self._calls[part.call][1].append(part.text)
        return new

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls, in order."""
        return tuple(ToolCall(c.id, c.name, "".join(arguments)) for c, arguments in self._calls)


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How the reply to one prompt is written.

    Args:
        family: the model's syntax.
        thinking: None where it does not reason, or its reasoning is to stay in the text.
        tools: what may be called.
    """

    family: Family
    thinking: Thinking | None
    tools: tuple[Tool, ...] = ()

    def reply(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> Reply | PlainReply:
        """A reader for one reply."""
        if self.thinking is None and not self.tools and not self.family.markers(False):
            return PlainReply(tokenizer, stop)
        return Reply(tokenizer, self, stop)
