"""Bodies of llama-server's text routes; of ``/tokenize`` vLLM's fields too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from oxillama_torch.engine.request import Pooling
from oxillama_torch.errors import RequestError
from oxillama_torch.server.schemas.chat import Message
from oxillama_torch.server.schemas.common import StrictModel
from oxillama_torch.server.schemas.lists import Few, Many, Several
from oxillama_torch.server.service import Service

__all__ = ["ApplyTemplateBody", "DetokenizeBody", "NativeEmbeddingBody", "TokenizeBody"]

NonEmpty = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Several[TokenId]


class TokenizeBody(StrictModel):
    """``content`` is llama-server's form, ``prompt`` or ``messages`` vLLM's."""

    model: str | None = None
    content: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    prompt: str | None = None
    messages: Annotated[Few[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeBody(StrictModel):
    model: str | None = None
    tokens: Many[int]


class ApplyTemplateBody(StrictModel):
    model: str | None = None
    messages: Annotated[Few[Message], Field(min_length=1)]
    tools: Many[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class NativeEmbeddingBody(StrictModel):
    """``embd_normalize``: -1 none, 0 by the largest, 1 taxicab, 2 Euclid, p."""

    model: str | None = None
    content: Annotated[
        NonEmpty | Several[NonEmpty] | TokenIds | Several[TokenIds],
        Field(validation_alias=AliasChoices("content", "input")),
    ]
    embd_normalize: Annotated[int, Field(ge=-1, le=1000)] = 2
    pooling: Literal["last", "mean", "cls", "max", "none"] | None = None

    def engine_pooling(self, default: Pooling) -> Pooling | None:
        """The request's pooling, else the model's; None: a row for each token."""
        if self.pooling is None:
            return default
        return {"cls": "first", "none": None}.get(self.pooling, self.pooling)

    def prompts(self, service: Service) -> list[list[int]]:
        """Token ids of each input; token arrays are used verbatim."""
        given = self.content
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        return [self._ids(item, f"content[{i}]", service) for i, item in enumerate(given)]

    @staticmethod
    def _ids(item: str | TokenIds, param: str, service: Service) -> list[int]:
        ids = service.encode(item, param) if isinstance(item, str) else item
        if not ids:
            raise RequestError("an input must not be empty.", param=param)
        if not all(0 <= token_id < service.tokenizer.vocab_size for token_id in ids):
            raise RequestError("token id out of range", param=param)
        if len(ids) > service.engine.max_context:
            raise RequestError(
                f"the input has {len(ids)} tokens, the context {service.engine.max_context}",
                code="context_length_exceeded",
                param=param,
            )
        return ids
