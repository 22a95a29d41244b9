"""Fields of text completions that look for likelier answers: ``best_of`` and beam search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from oxillama_torch.errors import RequestError
from oxillama_torch.server.schemas.sampling import Finite

__all__ = ["SearchFields"]

#: What a beam search has a use for.
_BEAM_FIELDS = {
    "best_of",
    "early_stopping",
    "length_penalty",
    "logprobs",
    "lora",
    "max_tokens",
    "model",
    "n",
    "prompt",
    "seed",
    "temperature",
    "use_beam_search",
    "user",
}


class SearchFields(BaseModel):
    """``use_beam_search`` and what goes with it are vLLM's; ``best_of`` is then the width."""

    model_config = ConfigDict(strict=True)

    n: int | None = None
    stream: bool = False
    temperature: float | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    use_beam_search: bool = False
    length_penalty: Annotated[Finite, Field(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None

    def candidates(self) -> int:
        """Completions to make of each prompt, to return the best ``n`` of them.

        Raises:
            RequestError: ``best_of`` is below ``n``, or the best are asked for in a stream.
        """
        n = self.n or 1
        count = n if self.best_of is None else self.best_of
        if count < n:
            raise RequestError("'best_of' must not be below 'n'.", param="best_of")
        if self.stream and count > n:
            raise RequestError("the best of several cannot be streamed.", param="best_of")
        if not self.use_beam_search and (self.length_penalty, self.early_stopping) != (None, None):
            name = "early_stopping" if self.length_penalty is None else "length_penalty"
            raise RequestError(f"{name!r} needs 'use_beam_search': true.", param=name)
        return count

    def beam_options(self, max_tokens: int) -> dict[str, Any]:
        """Options of a beam search.

        Raises:
            RequestError: a field that it has no use for.
        """
        given = self.model_fields_set & set(type(self).model_fields)
        for name in sorted(given - _BEAM_FIELDS):
            if getattr(self, name) not in (None, False, [], {}):
                raise RequestError(f"{name!r} does not go with 'use_beam_search'.", param=name)
        if self.temperature not in (None, 0.0):
            raise RequestError("a beam search has no temperature.", param="temperature")
        return {
            "width": self.candidates(),
            "max_tokens": max_tokens,
            "length_penalty": 1.0 if self.length_penalty is None else self.length_penalty,
            "early_stopping": self.early_stopping or False,
        }
