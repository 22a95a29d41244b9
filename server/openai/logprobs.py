"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.engine.request import TokenLogprobs
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["chat_logprob", "completion_logprobs"]

# JSON has no -inf; OpenAI reports this for impossible tokens.
_IMPOSSIBLE = -9999.0


def chat_logprob(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict:
    """One item of ``choices[].logprobs.content``."""

    def describe(token_id: int, logprob: float) -> dict:
        data = tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, _IMPOSSIBLE),
            "bytes": list(data),
        }

    top = [describe(token_id, logprob) for token_id, logprob in entry.top]
    return {**describe(entry.token_id, entry.logprob), "top_logprobs": top}


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    tokenizer: Tokenizer,
    offset: int = 0,
) -> dict:
    """``choices[].logprobs`` of a text completion.

    Args:
        token_ids: the tokens reported.
        entries: their log-probabilities; None (the first token of a prompt) becomes null.
        offset: characters of text before the first token.
    """
    tokens, values, top, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, entries, strict=True):
        text = _text(token_id, tokenizer)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else max(entry.logprob, _IMPOSSIBLE))
        top.append(None if entry is None else _top(entry, tokenizer))
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _top(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """Alternatives by text, the chosen token always among them; the likelier of equal texts."""
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        top.setdefault(_text(token_id, tokenizer), max(logprob, _IMPOSSIBLE))
    return top


def _text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; bytes that are no UTF-8 on their own are shown as OpenAI shows them."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
