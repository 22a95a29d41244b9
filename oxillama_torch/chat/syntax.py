"""Which syntax a model has: found once, from its chat template and its vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.families.command_r import CommandR
from oxillama_torch.chat.families.deepseek import DeepSeek
from oxillama_torch.chat.families.gemma import Gemma
from oxillama_torch.chat.families.generic import Generic
from oxillama_torch.chat.families.glm import Glm
from oxillama_torch.chat.families.harmony import Harmony
from oxillama_torch.chat.families.hermes import Hermes
from oxillama_torch.chat.families.kimi import Kimi
from oxillama_torch.chat.families.lists import Lists
from oxillama_torch.chat.families.llama import Llama
from oxillama_torch.chat.families.mistral import Mistral
from oxillama_torch.chat.families.phi import Phi
from oxillama_torch.chat.families.qwen_coder import QwenCoder
from oxillama_torch.chat.grammar import Thinking
from oxillama_torch.tokenizer.chat_template import ChatTemplate
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Syntax", "family_of", "syntax_of"]

# In this order: a later family's marks may be part of an earlier one's.
_FAMILIES: tuple[type[Family], ...] = (
    Harmony,
    Gemma,
    Kimi,
    DeepSeek,
    Mistral,
    QwenCoder,
    Glm,
    Hermes,
    CommandR,
    Phi,
    Lists,
    Llama,
)

_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>", "<channel|>"),
)

_known: weakref.WeakKeyDictionary[ChatTemplate, Syntax] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Syntax:
    """How one model writes calls and reasoning.

    Args:
        family: how it writes calls.
        think: the spellings around its reasoning; None: it does not reason.
    """

    family: Family
    think: tuple[str, str] | None

    def thinking(
        self, prompt: Sequence[int], tokenizer: Tokenizer, budget: int | None = None
    ) -> Thinking | None:
        """How the reply to a prompt reasons: the prompt may have opened the reasoning already."""
        if self.think is None:
            return None
        begin, end = (self.family.marker(spelling) for spelling in self.think)
        # The template may write a line break behind the marker.
        tail = tokenizer.decode(prompt[-16:]).rstrip()
        return Thinking(begin, end, tail.endswith(begin.spelling), budget)


def family_of(source: str) -> type[Family]:
    """The family that a chat template belongs to."""
    return next((family for family in _FAMILIES if family.speaks(source)), Generic)


def syntax_of(template: ChatTemplate, tokenizer: Tokenizer) -> Syntax:
    """The syntax of a model."""
    found = _known.get(template)
    if found is None:
        family = family_of(template.tool_source)(template.tool_source, tokenizer.special_id)
        found = _known[template] = Syntax(family, _think(family, template.source))
    return found


def _think(family: Family, source: str) -> tuple[str, str] | None:
    if isinstance(family, Harmony):
        return "<|channel|>", "<|end|>"
    for begin, end in _THINKING:
        if end in source or begin in source:
            return begin, end
    return None
