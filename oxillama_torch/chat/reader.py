"""Reading a reply while it is being written: the machine that every family's parser runs on.

A parser is a generator that reads straight on and yields where it needs more input, so that a reply
comes out the same however it was cut into tokens. It works with the methods here that are
generators (``yield from``) and hands over what it found with those that are not.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

from oxillama_torch.chat.markers import OPEN, shown
from oxillama_torch.chat.parts import CallArguments, CallStarted, Part, Text, Thought
from oxillama_torch.chat.tool import Tool
from oxillama_torch.tokenizer.text_stream import StopStrings

__all__ = ["Program", "Reader", "new_call_id"]

T = TypeVar("T")
#: Part of a parser: yields where input is wanting, returns what it read.
Program = Generator[None, None, T]

_ALPHABET = string.ascii_letters + string.digits


def new_call_id() -> str:
    """An id for a call, as OpenAI's look."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class Reader:
    """Takes a reply's text, gives its parts.

    White space between parts is layout and dropped: around reasoning, and around calls.

    Args:
        program: the parser; called with this reader.
        tools: what may be called, by name. What calls another is no call, but text.
        stop: strings that end the answer; reasoning and calls are not searched for them.
        new_id: makes ids for calls that come without.

    Attributes:
        calls: number of calls so far.
        stopped: whether a stop string has ended the answer.
        thinking: whether what comes now is reasoning.
    """

    def __init__(
        self,
        program: Callable[[Reader], Program[None]],
        *,
        tools: Mapping[str, Tool] | None = None,
        stop: tuple[str, ...] = (),
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.tools = tools or {}
        self.calls = 0
        self._new_id = new_id
        self._stop = StopStrings(stop)
        self._buffer = ""
        self._at = 0
        self._saved: int | None = None
        self._ended = False
        self._parts: list[Part] = []
        self._space = ""  # white space that may turn out to be layout
        self._after_part = False  # leading white space is layout
        self.thinking = False
        self._program = program(self)

    @property
    def stopped(self) -> bool:
        return self._stop.finished is not None

    def push(self, text: str) -> list[Part]:
        """Take more of the reply; return what became certain with it."""
        self._buffer += text
        return self._run()

    def end(self) -> list[Part]:
        """The reply is over; return what was held back."""
        if self._ended:
            return []
        self._ended = True
        parts = self._run()
        self._answer(self._stop.flush())
        if self._space and not self.calls and not self.thinking:
            self._put(Text(self._space))
        return parts + self._take_parts()

    def _run(self) -> list[Part]:
        if not self.stopped:
            next(self._program, None)
        keep = self._at if self._saved is None else self._saved
        self._buffer = self._buffer[keep:]
        self._at -= keep
        if self._saved is not None:
            self._saved = 0
        return self._take_parts()

    def _take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # What parsers read with.

    def wait(self) -> Program[bool]:
        """Wait for more input; False when there will be none."""
        if self._ended:
            return False
        yield
        return True

    def until(self, marks: Sequence[str], emit: Callable[[str], None]) -> Program[str | None]:
        """Pass text on up to the first of ``marks`` and past it; None when the reply ends first."""
        while True:
            hits = [(i, -len(m), m) for m in marks if (i := self._buffer.find(m, self._at)) >= 0]
            if hits:
                start, _, mark = min(hits)
                emit(self._buffer[self._at : start])
                self._at = start + len(mark)
                return mark
            rest = self._buffer[self._at :]
            held = 0 if self._ended else _beginning_of(marks, rest)
            emit(rest[: len(rest) - held])
            self._at = len(self._buffer) - held
            if not (yield from self.wait()):
                return None

    def accept(self, literal: str) -> Program[bool]:
        """Read ``literal`` if it comes next."""
        while True:
            have = self._buffer[self._at : self._at + len(literal)]
            if have == literal:
                self._at += len(literal)
                return True
            if not literal.startswith(have) or not (yield from self.wait()):
                return False

    def peek(self) -> Program[str]:
        """The next character, which stays; empty at the end."""
        while self._at == len(self._buffer):
            if not (yield from self.wait()):
                return ""
        return self._buffer[self._at]

    def take_while(self, wanted: Callable[[str], bool]) -> Program[str]:
        """Read characters as long as they are ``wanted``; marker tokens are not."""
        taken = ""
        while (char := (yield from self.peek())) and char != OPEN and wanted(char):
            taken += char
            self._at += 1
        return taken

    def space(self) -> Program[str]:
        """Read white space."""
        return self.take_while(str.isspace)

    def chunk(self) -> Program[str]:
        """What has come and is not read yet, left in place; empty at the end."""
        yield from self.peek()
        return self._buffer[self._at :]

    def skip(self, characters: int) -> None:
        """Count characters of ``chunk`` as read."""
        self._at += characters

    def attempt(self, mark: str, program: Program[bool]) -> Program[bool]:
        """Run a parser behind ``mark``; what it does not recognise becomes text, the mark first.

        Returns: whether it was recognised. If not, reading goes on right behind the mark.
        """
        self._saved = self._at
        recognised = yield from program
        start, self._saved = self._saved, None
        if recognised or start is None:
            return True
        self._at = start
        self.text(mark)
        return False

    # What parsers hand over.

    def text(self, text: str) -> None:
        """A piece of the answer."""
        if text and not self.stopped:
            self._answer(self._stop.push(shown(text)))

    def thought_begins(self) -> None:
        """What follows is reasoning."""
        self._begin_part()
        self.thinking = True

    def thought(self, text: str) -> None:
        """A piece of the reasoning."""
        self._put_trimmed(shown(text), Thought)

    def thought_ends(self) -> None:
        """The reasoning is over; the answer follows."""
        self.thinking = False
        self._space, self._after_part = "", True

    def start_call(self, name: str, call_id: str | None = None) -> bool:
        """A call of the tool ``name`` begins; False if there is no such tool."""
        if name not in self.tools:
            return False
        self._begin_part()
        self._put(CallStarted(self.calls, call_id or self._new_id(), name))
        self.calls += 1
        # Nothing that is part of a call is ever given back.
        self._saved = None
        return True

    def arguments(self, text: str) -> None:
        """A fragment of the arguments of the call that began last."""
        if text:
            self._put(CallArguments(self.calls - 1, shown(text)))

    def _begin_part(self) -> None:
        self._answer(self._stop.flush())
        self._space, self._after_part = "", True

    def _answer(self, text: str) -> None:
        self._put_trimmed(text, Text)

    def _put_trimmed(self, text: str, kind: type[Text] | type[Thought]) -> None:
        if self._after_part:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            self._put(kind(self._space + body))
            self._space, self._after_part = "", False
        self._space += text[len(body) :]

    def _put(self, part: Part) -> None:
        last = self._parts[-1] if self._parts else None
        if isinstance(part, Text | Thought) and type(last) is type(part):
            self._parts[-1] = type(part)(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments):
            self._parts[-1] = CallArguments(part.call, last.text + part.text)
        else:
            self._parts.append(part)


def _beginning_of(marks: Sequence[str], text: str) -> int:
    """Length of the longest end of ``text`` with which one of ``marks`` may begin."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[len(text) - length :]) for mark in marks):
            return length
    return 0
