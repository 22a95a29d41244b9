"""gpt-oss: everything the model writes is a message in a channel.

    <|channel|>analysis<|message|>The user wants ...<|end|><|start|>assistant
    <|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": 3}<|call|>

without the line break; answers come in the channel ``final``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, Thinking, Wish, literal
from oxillama_torch.chat.json_reader import json_value
from oxillama_torch.chat.markers import Marker, shown
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Harmony"]

_START, _END, _MESSAGE = "<|start|>", "<|end|>", "<|message|>"
_CHANNEL, _CONSTRAIN = "<|channel|>", "<|constrain|>"
_CALL, _RETURN = "<|call|>", "<|return|>"
_CHANNELS = re.compile(r"<\|channel\|>\s*(analysis|commentary|final)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([a-zA-Z0-9_.-]+)")


class Harmony(Family):
    name = "harmony"

    @classmethod
    def speaks(cls, source: str) -> bool:
        return _CHANNEL in source and _MESSAGE in source

    def markers(self, calls: bool) -> list[Marker]:
        names = (_START, _END, _MESSAGE, _CHANNEL, _CONSTRAIN, _CALL, _RETURN)
        return [self.marker(name) for name in names]

    def read(self, reader: Reader, thinking: Thinking | None, calls: bool) -> Program[None]:
        """Messages one after the other; text that is in none of them belongs to the answer."""
        ends = [self.text(name) for name in (_END, _START, _CALL, _RETURN, _CHANNEL)]
        mark: str | None = ""
        while mark is not None:
            header = yield from self._header(reader, mark)
            channel, recipient = header or ("final", None)
            if calls and recipient is not None and reader.start_call(recipient):
                yield from reader.space()
                yield from json_value(reader, reader.arguments)
                mark = yield from reader.until(ends, lambda _: None)
            elif channel == "analysis" and thinking is not None:
                reader.thought_begins()
                mark = yield from reader.until(ends, reader.thought)
                if mark is not None:
                    reader.thought_ends()
            else:
                mark = yield from reader.until(ends, reader.text)

    def _header(self, reader: Reader, mark: str) -> Program[tuple[str, str | None] | None]:
        """Channel and recipient of the message that follows behind ``mark``; None if none does."""
        held = [mark]
        begins = (self.text(_START), self.text(_CHANNEL))

        def head() -> Program[bool]:
            begun = mark in begins
            for beginning in (*begins, " to="):
                if not begun:
                    begun = yield from reader.accept(beginning)
                    held.append(beginning if begun else "")
            if not begun:
                return False
            return (yield from reader.until([self.text(_MESSAGE)], held.append)) is not None

        if not (yield from reader.attempt(mark if mark in begins else "", head())):
            return None
        text = shown("".join(held))
        channels, recipient = _CHANNELS.findall(text), _RECIPIENT.search(text)
        return channels[-1] if channels else "final", recipient[1] if recipient else None

    def grammar(self, wish: Wish) -> str:
        grammar = Grammar()
        opening = f"({self.lark(_START)} {literal('assistant')})?"
        channel, message = self.lark(_CHANNEL), self.lark(_MESSAGE)
        budget = wish.thinking.budget if wish.thinking is not None else None
        inside = "TEXT"
        if budget is not None:
            inside = grammar.rule("think", "TEXT", f"max_tokens={budget}") if budget else ""
        thought = f'{channel} "analysis" {message} {inside} {self.lark(_END)}'
        constrain = f'(" " {self.lark(_CONSTRAIN)} "json")?' if wish.answer else ""
        answer = grammar.rule("answer", wish.answer) if wish.answer else "TEXT"
        final = f'{opening} {channel} "final" {constrain} {message} {answer}'
        replies = [] if wish.must_call else [final]
        if wish.tools:
            replies.append(f"{opening} {self.section(grammar, wish.tools, wish.many)}")
        if wish.tools and not wish.must_call:
            # What the model says to the user before it calls.
            thought = f'({thought} | {channel} "commentary" {message} TEXT {self.lark(_END)})'
        grammar.rule("thought", f"{opening} {thought}")
        return grammar.source(f"thought* ({' | '.join(replies)})")

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        # A call ends the turn: the model makes one at a time.
        choices = " | ".join(
            f"{literal(tool.name + ' ')} {self.lark(_CONSTRAIN)} {literal('json')}"
            f" {self.lark(_MESSAGE)} {grammar.arguments(tool)}"
            for tool in tools
        )
        return f'{self.lark(_CHANNEL)} "commentary to=functions." ({choices})'
