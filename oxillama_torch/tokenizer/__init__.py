"""Text to token ids and back, and chat templates.

Names are loaded on first use: the chat-template worker imports this package in a fresh process
and must start in a fraction of a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxillama_torch.tokenizer.chat_template import ChatTemplate
    from oxillama_torch.tokenizer.detokenizer import Detokenizer
    from oxillama_torch.tokenizer.text_stream import TextStream
    from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "TextStream", "Tokenizer"]

_HOMES = {
    "ChatTemplate": "chat_template",
    "Detokenizer": "detokenizer",
    "TextStream": "text_stream",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
