"""Body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from oxillama_torch.chat.answer import answer_of
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.schemas.common import GenerationBody
from oxillama_torch.server.schemas.constraint import ConstraintFields
from oxillama_torch.server.schemas.lists import Few, Many
from oxillama_torch.server.schemas.search import SearchFields
from oxillama_torch.server.service import Service

__all__ = ["CompletionBody"]

TokenIds = Many[int]


class CompletionBody(GenerationBody, ConstraintFields, SearchFields):
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": ("",),
    }

    prompt: str | Few[str] | TokenIds | Few[TokenIds]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    response_format: dict[str, Any] | None = None

    def prompts(self, service: Service) -> list[list[int]]:
        """Token ids of each prompt. Token arrays are used verbatim, without a BOS token."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        prompts = []
        for index, item in enumerate(prompt):
            ids = service.encode(item, f"prompt[{index}]") if isinstance(item, str) else item
            self._check_ids(ids, index, service.tokenizer.vocab_size)
            prompts.append(ids)
        if not prompts:
            raise RequestError("'prompt' must not be empty.", param="prompt")
        return prompts

    @staticmethod
    def _check_ids(ids: list[int], index: int, vocab_size: int) -> None:
        if not ids:
            raise RequestError("a prompt must have at least one token.", param=f"prompt[{index}]")
        if not all(0 <= token_id < vocab_size for token_id in ids):
            raise RequestError(
                f"token ids must be between 0 and {vocab_size - 1}", param=f"prompt[{index}]"
            )

    def sampling_params(self, vocab_size: int) -> SamplingParams:
        """Sampling parameters; ``echo`` with ``logprobs`` asks for the prompt's too."""
        count = self.candidates()
        # The best of several are found by their log-probabilities, shown or not.
        ranked = 0 if count > (self.n or 1) else None
        return SamplingParams(
            max_tokens=self.max_tokens,
            logprobs=ranked if self.logprobs is None else self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            constraint=self._constraint(),
            **{**self.base_params(vocab_size), "n": count},
        )

    def _constraint(self) -> Constraint | None:
        """What the text has to be, by ``response_format`` or by a field of its own."""
        answer = answer_of(self.response_format, self.constraint())
        return None if answer is None else answer.constraint
