"""What a request must be before the engine takes it in."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral

from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.custom import find_processors

__all__ = ["check_request"]


def check_request(
    request: GenerationRequest,
    *,
    vocab_size: int,
    max_context: int,
    adapters: Collection[str] = (),
) -> None:
    """Refuse a request the engine could not serve.

    Args:
        request: what was asked for.
        vocab_size: ids must lie below it.
        max_context: most tokens of one request.
        adapters: names of those that are loaded.

    Raises:
        RequestError: names the field.
    """
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("the prompt has no tokens", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        wrong = next(i for i in prompt if not 0 <= i < vocab_size)
        raise RequestError(f"token id {wrong} is not below {vocab_size}", param="prompt")
    if request.pooling is not None and (
        request.capture != "hidden" or params.prompt_logprobs is not None
    ):
        raise RequestError("pooling is for captured hidden states alone", param="pooling")
    for token_id in params.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} is not below {vocab_size}", param=f"logit_bias.{token_id}"
            )
    # A GPU beyond use would be the answer to an id that is none: end tokens are banned at first.
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    for name in ("bad_words", "dry_sequence_breakers"):
        for word in getattr(params, name):
            _check_ids(name, () if isinstance(word, str) else word, vocab_size)
    find_processors(params.processors)
    if len(prompt) + (params.max_tokens != 0) > max_context:
        raise RequestError(
            f"This model's maximum context length is {max_context} tokens. "
            f"However, your prompt has {len(prompt)} tokens"
            + ("." if len(prompt) > max_context else ", which leaves none to generate."),
            code="context_length_exceeded",
            param="prompt",
        )
    _check_adapters(request.adapters, adapters)


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    for token_id in ids:
        if not isinstance(token_id, Integral) or not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id!r} is not below {vocab_size}", param=name)


def _check_adapters(wanted: tuple[tuple[str, float], ...], loaded: Collection[str]) -> None:
    for name, scale in wanted:
        if name not in loaded:
            known = ", ".join(loaded) or "none"
            raise RequestError(
                f"adapter {name!r} is not loaded; loaded: {known}",
                status=404,
                code="adapter_not_found",
                param="adapters",
            )
        if not math.isfinite(scale):
            raise RequestError(f"the scale of adapter {name!r} is {scale}", param="adapters")
    names = [name for name, _ in wanted]
    if len(set(names)) < len(names):
        raise RequestError("an adapter is named twice", param="adapters")
