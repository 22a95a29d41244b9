"""llama.cpp's grammars (GBNF) in llguidance's Lark dialect.

llguidance cuts a text into lexemes, the longest that can stand at a place, before it looks at
rules: ``("a" | "ab") "bc"`` does not allow ``abc`` there, and the converter it brings makes one
lexeme of ``word ::= [a-z]+``, so that ``root ::= word "s"`` allows nothing at all. Here a grammar
without recursion becomes a single lexeme, an expression for the whole output. In others, rules are
lexemes where that changes nothing (see ``constraint_rules``); failing that, each character is one.

Format: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import json
import re

from oxillama_torch.sampling.constraint_rules import (
    Char,
    Item,
    Rules,
    has_tokens,
    left_recursive,
    lexemes,
    recursive,
    references,
)

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
_LAST = 0x10FFFF
_ANY = Char("/(?s:.)/", ((0, _LAST),))


class GbnfError(ValueError):
    """What is wrong with a grammar, and where."""


def gbnf_to_lark(source: str) -> str:
    """Convert a grammar.

    Raises:
        GbnfError: it is not sound: syntax, a rule that is missing, defined twice or left-recursive.
    """
    rules = _Parser(source).rules()
    if "root" not in rules:
        raise GbnfError("there is no rule 'root'")
    for name, alternatives in rules.items():
        for used in references(alternatives):
            if used not in rules:
                raise GbnfError(f"rule {name!r} uses {used!r}, which is not defined")
    if (name := left_recursive(rules)) is not None:
        raise GbnfError(f"rule {name!r} is left-recursive")
    if recursive(rules) or any(map(has_tokens, rules.values())):
        return _Writer(rules, lexemes(rules)).write()
    return _Writer(rules, set(rules)).write()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source, self._at, self._depth = source, 0, 0

    def rules(self) -> Rules:
        """Alternatives by name, in order."""
        rules: Rules = {}
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

    def _alternatives(self) -> list[list[Item]]:
        found = [self._sequence()]
        while self._source.startswith("|", self._at):
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            found.append(self._sequence())
        return found

    def _sequence(self) -> list[Item]:
        items: list[Item] = []
        while (item := self._item()) is not None:
            self._repeat(item)
            items.append(item)
            self._skip(_SPACE_AND_LINES if self._depth else _SPACE)
        return items

    def _item(self) -> Item | None:
        """The next part of a sequence; None at its end."""
        match self._source[self._at : self._at + 1]:
            case '"':
                return Item(text=self._literal())
            case "[":
                return Item(text=[self._class()])
            case "(":
                return self._group()
            case ".":
                self._at += 1
                return Item(text=[_ANY])
            case "<":
                return Item(token=self._match(_TOKEN, "a token such as <|end|> or <[12]>"))
        if _NAME.match(self._source, self._at):
            return Item(rule=self._match(_NAME, "a name"))
        return None

    def _group(self) -> Item:
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
        return Item(group=group)

    def _repeat(self, item: Item) -> None:
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

    def _literal(self) -> list[Char]:
        self._at += 1
        text = []
        while not self._source.startswith('"', self._at):
            text.append(self._character())
        self._at += 1
        return [Char(json.dumps(c, ensure_ascii=False), ((ord(c), ord(c)),)) for c in text]

    def _class(self) -> Char:
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
            ranges.append((ord(first), ord(last)))
        self._at += 1
        if not ranges:
            if not negated:
                raise self._error("an empty class")
            return _ANY
        text = "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges)
        if negated:
            return Char(f"/[^{text}]/", _others(ranges))
        return Char(f"/[{text}]/", tuple(ranges))

    def _character(self) -> str:
        char = self._source[self._at : self._at + 1]
        if char == "\\":
            found = _ESCAPE.match(self._source, self._at)
            if found is None:
                raise self._error("an unknown escape sequence")
            self._at = found.end()
            code = int(found[1] or found[2] or found[3] or "0", 16)
            if code > _LAST or 0xD800 <= code <= 0xDFFF:
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


def _others(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The characters that lie in none of the ranges."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return (*found, (start, _LAST)) if start <= _LAST else tuple(found)


class _Writer:
    """Rules in Lark: lexemes in upper case, the others in lower case.

    Args:
        rules: what to write.
        lexemes: rules that are lexemes wherever they are used.
    """

    def __init__(self, rules: Rules, lexemes: set[str]) -> None:
        self._rules, self._lexemes = rules, lexemes
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._written: dict[str, str] = {}

    def write(self) -> str:
        """The whole grammar; rules that nothing uses are left out."""
        wanted = [("root", "root" in self._lexemes)]
        for name, within in wanted:
            label = self._name(name, within)
            if label not in self._written:
                body = self._rules[name]
                self._written[label] = self._alternatives(body, within)
                wanted += [(n, within or n in self._lexemes) for n in references(body)]
        start = self._name("root", "root" in self._lexemes)
        lines = [f"{label}: {body}" for label, body in self._written.items()]
        return "\n".join([f"start: {start}", *lines]) + "\n"

    def _name(self, name: str, within: bool) -> str:
        return f"{'R' if within else 'r'}{self._numbers[name]}"

    def _alternatives(self, alternatives: list[list[Item]], within: bool) -> str:
        """The body of a rule; ``within``: of a lexeme."""
        return " | ".join(
            " ".join(self._item(item, within) for item in items) or '""' for items in alternatives
        )

    def _item(self, item: Item, within: bool) -> str:
        if item.most == 0 or item.text == []:
            return '""'
        if item.rule is not None:
            text = self._name(item.rule, within or item.rule in self._lexemes)
        elif item.text is not None:
            text = self._text(item.text)
        else:
            text = item.token or f"({self._alternatives(item.group, within)})"
        if (item.least, item.most) == (1, 1):
            return text
        return f"{text}{{{item.least},{'' if item.most is None else item.most}}}"

    def _text(self, chars: list[Char]) -> str:
        """One lexeme where lexemes have several characters, else one for each character."""
        if len(chars) == 1:
            return chars[0].lark
        if self._lexemes:
            return json.dumps("".join(json.loads(char.lark) for char in chars), ensure_ascii=False)
        return f"({' '.join(char.lark for char in chars)})"
