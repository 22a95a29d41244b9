"""What the families share: a marker, calls behind it, and reasoning before the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from oxillama_torch.chat.grammar import Grammar, Thinking, Wish, literal
from oxillama_torch.chat.markers import Marker
from oxillama_torch.chat.reader import Program, Reader, new_call_id
from oxillama_torch.chat.tool import Tool

__all__ = ["Family", "Message"]

Message = dict[str, Any]


class Family:
    """How one model writes calls.

    A family that only has another syntax sets ``trigger`` and ``others`` and writes ``call`` and
    ``section``; one with another order of things overrides ``read`` and ``grammar``.

    Args:
        source: the chat template used with tools.
        special_id: ``Tokenizer.special_id``.

    Attributes:
        name: for logs and messages.
        trigger: the marker that calls stand behind; empty: calls are the whole reply.
        others: further markers that the parser looks for.
        silent: markers that wrap the answer and are no part of it.
    """

    name: ClassVar[str]
    trigger: str = ""
    others: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    new_id: Callable[[], str] = staticmethod(new_call_id)

    def __init__(self, source: str, special_id: Callable[[str], int | None]) -> None:
        self.source = source
        self._special_id = special_id

    @classmethod
    def speaks(cls, source: str) -> bool:
        """Whether a template is one of this family."""
        raise AssertionError(f"{cls.__name__} is the family of all others")

    def marker(self, spelling: str) -> Marker:
        """The marker with this spelling in this model."""
        return Marker.of(spelling, self._special_id)

    def text(self, spelling: str) -> str:
        """What the parser sees of a marker."""
        return self.marker(spelling).text

    def lark(self, spelling: str) -> str:
        """What the grammar says for a marker."""
        return self.marker(spelling).lark

    def markers(self, calls: bool) -> list[Marker]:
        """The markers to be shown to the parser."""
        spellings = [*self.silent, *([self.trigger, *self.others] if calls else [])]
        return [self.marker(spelling) for spelling in spellings if spelling]

    def messages(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Messages and tool definitions in the form that the template takes."""
        return list(messages), [tool.definition() for tool in tools] or None

    # Reading.

    def read(self, reader: Reader, thinking: Thinking | None, calls: bool) -> Program[None]:
        """The parser of a whole reply."""
        if thinking is not None and thinking.open:
            yield from self.reason(reader, thinking)
        bare = calls and not self.trigger
        if bare:
            yield from self.read_bare(reader)
        triggers = [self.text(self.trigger)] if calls and self.trigger else []
        begins = [thinking.begin.text] if thinking is not None else []
        marks = [*triggers, *begins, *map(self.text, self.silent)]
        while (mark := (yield from reader.until(marks, reader.text))) is not None:
            if mark in begins:
                yield from self.reason(reader, thinking)
                if bare:
                    yield from self.read_bare(reader)
            elif mark in triggers:
                yield from reader.attempt(mark, self.call(reader))

    def reason(self, reader: Reader, thinking: Thinking) -> Program[None]:
        """Reasoning up to its end marker."""
        reader.thought_begins()
        if (yield from reader.until([thinking.end.text], reader.thought)) is not None:
            reader.thought_ends()

    def read_bare(self, reader: Reader) -> Program[None]:
        """Calls at the beginning of an answer, for families without a marker."""
        raise AssertionError(f"{self.name} has neither a marker nor calls without one")

    def call(self, reader: Reader) -> Program[bool]:
        """One or more calls behind the marker; False if there is none."""
        raise AssertionError(f"{self.name} does not say how it reads calls")

    # Enforcing.

    def grammar(self, wish: Wish) -> str:
        """The Lark grammar of a reply."""
        grammar = Grammar()
        thinking = grammar.thinking(wish.thinking)
        answer = grammar.rule("answer", wish.answer) if wish.answer else "TEXT"
        section = None
        if wish.tools:
            bare = not self.trigger and wish.answer and not wish.must_call
            write = self.bare_section if bare else self.section
            section = write(grammar, wish.tools, wish.many)
        gap = "GAP" if thinking else ""
        if section is None:
            return grammar.source(f"{thinking} {gap if wish.answer else ''} {self.wrap(answer)}")
        trigger = self.lark(self.trigger) if self.trigger else ""
        if wish.must_call:
            return grammar.source(f"{thinking} {gap} {trigger} {section}")
        if wish.answer or not self.trigger:
            text = self.wrap(answer if wish.answer else grammar.rule("PLAIN", _PLAIN))
            return grammar.source(f"{thinking} {gap} ({text} | {trigger} {section})")
        if self.marker(self.trigger).token_id is not None:
            return grammar.source(f"{thinking} {self.wrap('TEXT')} ({trigger} {section})?")
        head = grammar.rule("head", f"TEXT {literal(self.trigger)}", "lazy")
        return grammar.source(f"{thinking} ({self.wrap('TEXT')} | {head} {section})")

    def wrap(self, answer: str) -> str:
        """The answer with what this family writes around it."""
        return answer

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        """What comes behind the marker, as a Lark expression."""
        raise AssertionError(f"{self.name} does not say how it writes calls")

    def bare_section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        """The same where an answer in JSON may stand in its place."""
        call = grammar.call_objects(tools, "parameters")
        return grammar.several(call, literal("\n"), many)


#: A text that does not begin as calls without a marker do.
_PLAIN = r"/([^{\[ \t\r\n](.|\n)*)?/"
