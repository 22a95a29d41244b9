"""llama.cpp's grammars (GBNF) in llguidance's Lark dialect.

llguidance cuts a text into lexemes, the longest that can stand at a place, before it looks at
rules: ``("a" | "ab") "bc"`` does not allow ``abc`` there, and the converter it brings makes one
lexeme of ``word ::= [a-z]+``, so that ``root ::= word "s"`` allows nothing at all. Here a grammar
without recursion becomes a single lexeme, an expression for the whole output, and in any other
every character is one, so that no lexeme is the beginning of another. Both mean what GBNF means.

Format: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["GbnfError", "gbnf_to_lark"]

_MAX_DEPTH = 64
_MAX_REPEAT = 2000  # llama.cpp's own limit
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_COUNT = re.compile(r"\{[ \t]*(\d{1,9})[ \t]*(,[ \t]*(\d{1,9})?[ \t]*)?\}")
_TOKEN = re.compile(r"<(?:\[\d{1,9}\]|[^<>\[\]\s]{1,200})>")
_ESCAPE = re.compile(r'\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([tnr"\\\[\]]))')
_SHORT = {"t": "\t", "n": "\n", "r": "\r"}


class GbnfError(ValueError):
    """What is wrong with a grammar, and where."""


@dataclass(slots=True)
class _Item:
    """A part of a rule: one of ``text``, ``rule`` and ``group``; ``least`` to ``most`` times.

    Args:
        text: characters one after the other, each a string or an expression of Lark; or one token.
        rule: the name of a rule.
        group: alternatives.
        token: whether ``text`` is the name of a token of the vocabulary.
    """

    text: list[str] | None = None
    rule: str | None = None
    group: list[list[_Item]] = field(default_factory=list)
    least: int = 1
    most: int | None = 1
    token: bool = False


def gbnf_to_lark(source: str) -> str:
    """Convert a grammar.

    Raises:
        GbnfError: it is not sound: syntax, a rule that is missing, defined twice or left-recursive.
    """
    rules = _Parser(source).rules()
    if "root" not in rules:
        raise GbnfError("there is no rule 'root'")
    for name, alternatives in rules.items():
        for used in _references(alternatives):
            if used not in rules:
                raise GbnfError(f"rule {name!r} uses {used!r}, which is not defined")
    _refuse_left_recursion(rules)
    # Upper case is llguidance's sign of rules that together are one lexeme.
    letter = "r" if _is_recursive(rules) or _has_tokens(rules) else "R"
    names = {name: f"{letter}{index}" for index, name in enumerate(rules)}
    lines = [f"{names[name]}: {_lark(body, names)}" for name, body in rules.items()]
    return "\n".join([f"start: {names['root']}", *lines]) + "\n"


class _Parser:
    def __init__(self, source: str) -> None:
        self._source, self._at, self._depth = source, 0, 0

    def rules(self) -> dict[str, list[list[_Item]]]:
        """Alternatives by name, in order."""
        rules: dict[str, list[list[_Item]]] = {}
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._source):
            name = self._match(_NAME, "the name of a rule")
            if name in rules:
                raise self._error(f"rule {name!r} is defined twice")
            self._skip(_SPACE)
            if not self._source.startswith("::=", self._at):
                raise self._error("'::=' is missing")
            self._at += 3
            self._skip(_SPACE_AND_LINES)
            rules[name] = self._alternatives()
            if self._at < len(self._source) and self._source[self._at] not in "\r\n":
                raise self._error("something that is not understood")
            self._skip(_SPACE_AND_LINES)
        return rules

    def _alternatives(self) -> list[list[_Item]]:
        found = [self._sequence()]
        while self._source.startswith("|", self._at):
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            found.append(self._sequence())
        return found

    def _sequence(self) -> list[_Item]:
        items: list[_Item] = []
        while (item := self._item()) is not None:
            self._repeat(item)
            items.append(item)
            self._skip(_SPACE_AND_LINES if self._depth else _SPACE)
        return items

    def _item(self) -> _Item | None:
        """The next part of a sequence; None at its end."""
        match self._source[self._at : self._at + 1]:
            case '"':
                return _Item(text=self._literal())
            case "[":
                return _Item(text=[self._class()])
            case "(":
                return self._group()
            case ".":
                self._at += 1
                return _Item(text=["/(?s:.)/"])
            case "<":
                name = self._match(_TOKEN, "a token such as <|end|> or <[12]>")
                return _Item(text=[name], token=True)
        if _NAME.match(self._source, self._at):
            return _Item(rule=self._match(_NAME, "a name"))
        return None

    def _group(self) -> _Item:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"groups within more than {_MAX_DEPTH} others")
        self._at += 1
        self._skip(_SPACE_AND_LINES)
        group = self._alternatives()
        if not self._source.startswith(")", self._at):
            raise self._error("')' is missing")
        self._at += 1
        self._depth -= 1
        return _Item(group=group)

    def _repeat(self, item: _Item) -> None:
        self._skip(_SPACE_AND_LINES if self._depth else _SPACE)
        sign = self._source[self._at : self._at + 1]
        if sign and sign in "*+?":
            self._at += 1
            item.least, item.most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        elif sign == "{":
            found = _COUNT.match(self._source, self._at)
            if found is None:
                raise self._error("'{least,most}' is malformed")
            self._at = found.end()
            item.least = int(found[1])
            item.most = int(found[3]) if found[3] else None if found[2] else item.least
            if max(item.least, item.most or 0) > _MAX_REPEAT:
                raise self._error(f"more than {_MAX_REPEAT} repetitions")
            if item.most is not None and item.most < item.least:
                raise self._error("the most repetitions are fewer than the least")

    def _literal(self) -> list[str]:
        self._at += 1
        text = []
        while not self._source.startswith('"', self._at):
            text.append(self._character())
        self._at += 1
        return [json.dumps(character, ensure_ascii=False) for character in text]

    def _class(self) -> str:
        self._at += 1
        negated = self._source.startswith("^", self._at)
        self._at += negated
        ranges = []
        while not self._source.startswith("]", self._at):
            first = last = self._character()
            if self._source.startswith("-", self._at) and self._source[self._at + 1 :][:1] != "]":
                self._at += 1
                last = self._character()
            if last < first:
                raise self._error("a range that ends before it begins")
            ranges.append(rf"\x{{{ord(first):x}}}-\x{{{ord(last):x}}}")
        self._at += 1
        if not ranges:
            if not negated:
                raise self._error("an empty class")
            return "/(?s:.)/"
        return f"/[{'^' if negated else ''}{''.join(ranges)}]/"

    def _character(self) -> str:
        char = self._source[self._at : self._at + 1]
        if char == "\\":
            found = _ESCAPE.match(self._source, self._at)
            if found is None:
                raise self._error("an unknown escape sequence")
            self._at = found.end()
            code = int(found[1] or found[2] or found[3] or "0", 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise self._error("an escape sequence that is no character")
            return _SHORT.get(found[4], found[4]) if found[4] else chr(code)
        if not char or char in "\r\n":
            raise self._error("a text or class that does not end")
        self._at += 1
        return char

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._at = pattern.match(self._source, self._at).end()

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._source, self._at)
        if found is None:
            raise self._error(f"{what} is missing")
        self._at = found.end()
        return found[0]

    def _error(self, message: str) -> GbnfError:
        line = self._source.count("\n", 0, self._at) + 1
        column = self._at - self._source.rfind("\n", 0, self._at)
        return GbnfError(f"{message} (line {line}, column {column})")


def _references(alternatives: list[list[_Item]]) -> Iterator[str]:
    for item in (item for sequence in alternatives for item in sequence):
        if item.rule is not None:
            yield item.rule
        yield from _references(item.group)


def _lark(alternatives: list[list[_Item]], names: dict[str, str]) -> str:
    return " | ".join(" ".join(_one(i, names) for i in items) or '""' for items in alternatives)


def _one(item: _Item, names: dict[str, str]) -> str:
    if item.most == 0 or item.text == []:
        return '""'
    text = names[item.rule] if item.rule else f"({_lark(item.group, names)})"
    if item.text is not None:
        text = item.text[0] if len(item.text) == 1 else f"({' '.join(item.text)})"
    if (item.least, item.most) == (1, 1):
        return text
    return f"{text}{{{item.least},{'' if item.most is None else item.most}}}"


def _refuse_left_recursion(rules: dict[str, list[list[_Item]]]) -> None:
    empty: set[str] = set()

    def may_be_empty(item: _Item) -> bool:
        if item.least == 0 or item.rule in empty or item.text == []:
            return True
        return any(all(map(may_be_empty, sequence)) for sequence in item.group)

    def leftmost(alternatives: list[list[_Item]]) -> Iterator[str]:
        for sequence in alternatives:
            for item in sequence:
                if item.rule is not None:
                    yield item.rule
                yield from leftmost(item.group)
                if not may_be_empty(item):
                    break

    size = -1
    while size != len(empty):
        size = len(empty)
        empty |= {n for n, body in rules.items() if may_be_empty(_Item(group=body))}
    first = {name: set(leftmost(body)) for name, body in rules.items()}
    # Take away rules that begin with none that is left, until nothing changes: what stays leads
    # into a cycle.
    while done := [name for name, uses in first.items() if not uses & first.keys()]:
        for name in done:
            del first[name]
    if first:
        name, passed = next(iter(first)), set()
        while name not in passed:
            passed.add(name)
            name = min(first[name] & first.keys())
        raise GbnfError(f"rule {name!r} is left-recursive")


def _is_recursive(rules: dict[str, list[list[_Item]]]) -> bool:
    """Whether a rule uses itself, directly or by way of others."""
    left = {name: set(_references(body)) for name, body in rules.items()}
    while done := [name for name, uses in left.items() if not uses & left.keys()]:
        for name in done:
            del left[name]
    return bool(left)


def _has_tokens(rules: dict[str, list[list[_Item]]]) -> bool:
    def within(alternatives: list[list[_Item]]) -> bool:
        items = (item for sequence in alternatives for item in sequence)
        return any(item.token or within(item.group) for item in items)

    return any(map(within, rules.values()))
