"""Body of ``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oxillama_torch.engine.request import Pooling
from oxillama_torch.errors import RequestError
from oxillama_torch.server.schemas.common import ModelBody
from oxillama_torch.server.schemas.lists import Many
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["EmbeddingBody"]

MAX_INPUTS = 2048

TokenIds = Many[int]


class EmbeddingBody(ModelBody):
    """``pooling`` and ``lora`` are extensions."""

    input: str | Many[str] | TokenIds | Many[TokenIds]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["last", "mean", "cls", "max"] | None = None

    def engine_pooling(self, default: Pooling) -> Pooling:
        """The request's pooling, else the model's."""
        if self.pooling is None:
            return default
        return "first" if self.pooling == "cls" else self.pooling

    def prompts(self, tokenizer: Tokenizer, max_context: int) -> list[list[int]]:
        """Token ids of each input; token arrays are used verbatim."""
        given = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not 1 <= len(given) <= MAX_INPUTS:
            raise RequestError(f"'input' must have 1 to {MAX_INPUTS} items.", param="input")
        prompts = [self._ids(item, index, tokenizer) for index, item in enumerate(given)]
        for index, ids in enumerate(prompts):
            if len(ids) > max_context:
                raise RequestError(
                    f"This model's maximum context length is {max_context} tokens; "
                    f"the input has {len(ids)}.",
                    code="context_length_exceeded",
                    param=f"input[{index}]",
                )
        return prompts

    @staticmethod
    def _ids(item: str | TokenIds, index: int, tokenizer: Tokenizer) -> list[int]:
        ids = tokenizer.encode(item) if isinstance(item, str) and item else list(item)
        if not ids:
            raise RequestError("an input must not be empty.", param=f"input[{index}]")
        if not all(0 <= token_id < tokenizer.vocab_size for token_id in ids):
            raise RequestError(
                f"token ids must be between 0 and {tokenizer.vocab_size - 1}",
                param=f"input[{index}]",
            )
        return ids
