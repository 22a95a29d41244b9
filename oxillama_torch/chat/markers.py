"""Markers: the fixed spellings, ``<tool_call>`` for one, that divide a reply into its parts.

Where the vocabulary has a token of that spelling the token is the marker, and the same letters
written out with other tokens are plain text; where it has none, the letters are the marker. In the
text that readers work on, a marker token stands between two lone surrogates, which no decoded text
can hold: one search finds either kind, and never the wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["OPEN", "Marker", "shown"]

OPEN, _CLOSE = "\ud800", "\udfff"
_SHOWN = {ord(OPEN): None, ord(_CLOSE): None}


@dataclass(frozen=True, slots=True)
class Marker:
    """One marker of one model.

    Args:
        spelling: as people write it.
        token_id: the token, or None where it is written out.
    """

    spelling: str
    token_id: int | None

    @classmethod
    def of(cls, spelling: str, special_id: Callable[[str], int | None]) -> Marker:
        """The marker of a model with ``Tokenizer.special_id``."""
        return cls(spelling, special_id(spelling))

    @property
    def text(self) -> str:
        """What a reader has to look for."""
        return self.spelling if self.token_id is None else f"{OPEN}{self.spelling}{_CLOSE}"

    @property
    def lark(self) -> str:
        """The marker in a grammar of llguidance."""
        if self.token_id is None:
            return json.dumps(self.spelling, ensure_ascii=False)
        return f"<[{self.token_id}]>"


def shown(text: str) -> str:
    """Text as a person may see it: marker tokens by their spelling."""
    return text.translate(_SHOWN)
