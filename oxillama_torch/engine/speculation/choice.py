"""From a configuration to what makes the guesses, and whether a draft model fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.speculation.draft import DraftProposer
from oxillama_torch.engine.speculation.lookup import LookupProposer
from oxillama_torch.engine.speculation.proposer import Proposer
from oxillama_torch.engine.speculation.speculator import Speculator
from oxillama_torch.engine.stats import Counters
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.kv_formats import KVFormat
from oxillama_torch.kvcache.holdings import PageManager
from oxillama_torch.models.decoder import Decoder

__all__ = ["check_vocabulary", "speculator"]

_DRAFT_TOKENS = {"lookup": 8, "draft": 4}
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_UNUSED = 5  # LLAMA_TOKEN_TYPE_UNUSED of llama.cpp: what fills a vocabulary up


def speculator(
    config: EngineConfig,
    pages: PageManager,
    format: KVFormat,
    counters: Counters,
    *,
    vocab_size: int,
    draft: Decoder | None,
) -> Speculator | None:
    """What adds guesses to an engine's steps; None: nothing.

    Args:
        config: see EngineConfig.
        pages: the engine's.
        format: of keys and values in them.
        counters: the engine's.
        vocab_size: of the engine's model.
        draft: its draft, for ``speculation="draft"``.
    """
    if config.speculation == "none":
        return None
    proposer: Proposer = LookupProposer()
    if config.speculation == "draft":
        assert draft is not None, "a draft is loaded where a configuration asks for one"
        proposer = DraftProposer(
            draft,
            pages,
            format,
            max_batch_tokens=config.max_batch_tokens,
            vocab_size=vocab_size,
        )
    return Speculator(
        proposer,
        pages,
        max_batch_tokens=config.max_batch_tokens,
        most=config.draft_tokens or _DRAFT_TOKENS[config.speculation],
        counters=counters,
    )


def check_vocabulary(model: Mapping[str, Any], draft: Mapping[str, Any]) -> None:
    """Refuse a draft whose tokens are not the model's, id by id.

    At the end, one vocabulary may have tokens of the type "unused" that the other has not: files of
    one family are filled up differently.

    Args:
        model, draft: GGUF metadata.

    Raises:
        UnsupportedError: names the first token that differs.
    """
    ours, theirs = list(model.get(_TOKENS, ())), list(draft.get(_TOKENS, ()))
    common = min(len(ours), len(theirs))
    for token_id, (our, their) in enumerate(zip(ours, theirs)):
        if our != their:
            raise UnsupportedError(
                f"a draft model of another vocabulary: token {token_id} is {their!r}, "
                f"the model's is {our!r}"
            )
    for metadata, tokens in ((model, ours), (draft, theirs)):
        types = list(metadata.get(_TYPES, ()))
        if any(kind != _UNUSED for kind in types[common:]) or len(types) < len(tokens) > common:
            raise UnsupportedError(
                f"a draft model of another vocabulary: {len(theirs)} tokens, "
                f"the model has {len(ours)}"
            )
