"""Bodies of ``/tokenize`` and ``/detokenize``: llama-server's fields and vLLM's."""

from __future__ import annotations

from oxillama_torch.server.schemas.chat import Message
from oxillama_torch.server.schemas.common import StrictModel

__all__ = ["DetokenizeBody", "TokenizeBody"]


class TokenizeBody(StrictModel):
    """``content`` is llama-server's form, ``prompt`` or ``messages`` vLLM's."""

    content: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(StrictModel):
    tokens: list[int]
