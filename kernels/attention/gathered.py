"""Attention through torch's own fused kernel, on keys and values gathered from their pages.

What most engines without a paged kernel do, and a baseline for ours. On a CPU it is the fastest way
there is; on a GPU it copies the whole context in every call, so it serves there only when a rule
asks for it. How work is cut, and so the order of additions, is torch's business: ``fast`` alone.

Shapes: T query tokens of B requests, n of one; S its keys, L pages wide, H query heads, Hkv
key/value heads, G = H / Hkv, D key head dim, Dv value head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from oxillama_torch.kernels.kv_formats import KVFormat, decode, format_of, raw
from oxillama_torch.kernels.registry import Call, register

__all__ = ["attention"]


def _not_by_default(call: Call) -> str | None:
    return "copies the context in every call" if call.device == "cuda" else None


@register(
    "attention",
    "gathered",
    numerics=("fast",),
    unless_asked=_not_by_default,
    priority=120,
    error=1e-5,
)
def attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Arguments as those of :func:`oxillama_torch.kernels.attention.op.attention`."""
    del max_query_len, max_seq_len  # the lengths themselves are needed, and are at hand on a CPU
    page_size, group = k_pages.shape[1], q.shape[1] // k_pages.shape[2]
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    format = format_of(k_pages, q.shape[2])
    out = q.new_empty(*q.shape[:2], format.dim(v_pages.shape[3]))
    for row, length in enumerate(lengths):
        start, stop = starts[row : row + 2]
        if start == stop:
            continue
        first = 0 if window is None else max(0, length - (stop - start) - window + 1)
        first -= first % page_size
        table = page_table[row, first // page_size : -(-length // page_size)].long()
        k, v = (
            _widened(raw(pages)[table].flatten(0, 1)[: length - first], format, q.dtype)
            for pages in (k_pages, v_pages)
        )
        queries = q[start:stop].transpose(0, 1)
        hidden = _hidden(stop - start, length - first, window, q.device)
        if softcap is None and sinks is None and slopes is None:
            visible = None if hidden is None else ~hidden
            y = _fused(queries, k, v, visible, scale, group)
        else:
            y = _spelt_out(queries, k, v, hidden, scale, softcap, sinks, slopes)
        out[start:stop] = y.transpose(0, 1)
    return out


def _widened(rows: Tensor, format: KVFormat, dtype: torch.dtype) -> Tensor:
    """[S, Hkv, R] as pages have it -> [Hkv, S, D] in q's dtype."""
    if rows.dtype != format.dtype or format.packed:
        rows = decode(rows, format)
    return rows.to(dtype).transpose(0, 1)


def _hidden(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Keys that a query does not see, bool [n, S]; None when it sees all of them."""
    if queries == 1 and (window is None or keys <= window):
        return None
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = at - torch.arange(keys, device=device)
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, group: int
) -> Tensor:
    """q [H, n, D], k [Hkv, S, D], v [Hkv, S, Dv] -> [H, n, Dv]."""
    if q.shape[1] == 1:
        # One token: the heads of a group are rows of one product.
        packed = q.view(k.shape[0], group, -1)
        y = scaled_dot_product_attention(packed[None], k[None], v[None], visible, scale=scale)
        return y.view(q.shape[0], 1, -1)
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    return scaled_dot_product_attention(q[None], k[None], v[None], visible, scale=scale)[0]


def _spelt_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """With what the fused kernel lacks, in float32. Shapes as for ``_fused``."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.float().repeat_interleave(group, 0) for x in (k, v))
    scores = q.float() @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        (queries, keys), device = scores.shape[1:], scores.device
        at = torch.arange(keys - queries, keys, device=device)[:, None]
        scores += slopes[:, None, None] * (torch.arange(keys, device=device) - at)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[1]] @ v).to(q.dtype)
