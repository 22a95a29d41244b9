"""Launcher of attention over paged keys and values.

Shapes: T query tokens of B requests, Hq query heads, Hkv key/value heads (Hq a multiple), D key
head dim, Dv value head dim, P pages of S slots, L pages per row of the page table.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry

__all__ = ["attention"]

registry.declare(
    "attention",
    "oxillama_torch.kernels.attention.reference",
)


def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    numerics: str = "invariant",
) -> torch.Tensor:
    """``softmax(mask(cap(scale * q k^T))) v``, causal, over pages.

    Query row j of request b sits at position ``seq_lens[b] - (query_start[b+1] - query_start[b])
    + j`` and sees the keys at positions up to its own, or the last ``window`` of those. ``cap(x)``
    is ``softcap * tanh(x / softcap)``. A sink is one more logit per head in the softmax, without
    a value.

    Args:
        q: float32, bfloat16 or float16 [T, Hq, D], contiguous.
        k_pages, v_pages: float32, bfloat16 or float16 [P, S, Hkv, D] and [P, S, Hkv, Dv],
            contiguous, S a power of two.
        page_table: int32 [B, L]; entry [b, i] is the page of positions i*S to i*S+S-1. Entries
            past a request's last page are not read.
        query_start: int32 [B + 1], from 0 to T.
        seq_lens: int32 [B], tokens of each request including those of q.
        scale: usually ``D ** -0.5``.
        max_query_len: at least the most query tokens of a request; max_seq_len: at least
            the greatest of seq_lens. Known on the host, so that launching needs no synchronisation.
        window: positions a query sees, itself included; None: all.
        softcap: None for none.
        sinks: float32 [Hq] or None.
        numerics: ``"invariant"`` (a row's bits depend on its own request's tokens alone, not on
            chunking, batch or pages) or ``"fast"``.

    Returns:
        [T, Hq, Dv] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit.

    Source: Vaswani et al., arXiv 1706.03762; paging: Kwon et al., arXiv 2309.06180.
    """
    _check_heads(q, k_pages, v_pages, sinks)
    _check_batch(q, k_pages, page_table, query_start, seq_lens, max_query_len, max_seq_len)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: at least 1, or None, is wanted")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: a positive number, or None, is wanted")
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1], v_pages.shape[3])
    call = registry.Call(q.device.type, q.dtype, numerics, m=max_query_len)
    return registry.select("attention", call).function(
        q,
        k_pages,
        v_pages,
        page_table,
        query_start,
        seq_lens,
        scale=scale,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def _check_heads(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, sinks: torch.Tensor | None
) -> None:
    if q.ndim != 3 or k_pages.ndim != 4 or v_pages.ndim != 4:
        raise ValueError(
            f"q {tuple(q.shape)}, k_pages {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)}: "
            "[T, Hq, D], [P, S, Hkv, D] and [P, S, Hkv, Dv] are wanted"
        )
    if k_pages.shape[3] != q.shape[2] or k_pages.shape[:3] != v_pages.shape[:3]:
        raise ValueError(
            f"k_pages {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)}: "
            f"[P, S, Hkv, {q.shape[2]}] and [P, S, Hkv, Dv] are wanted"
        )
    page_size, kv_heads = k_pages.shape[1:3]
    if page_size & (page_size - 1):
        raise ValueError(f"pages have {page_size} slots: a power of two is wanted")
    if q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {kv_heads} key/value heads")
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"k_pages are {k_pages.dtype}, v_pages {v_pages.dtype}: they must agree")
    tensors = [("q", q), ("k_pages", k_pages), ("v_pages", v_pages)]
    if sinks is not None:
        if tuple(sinks.shape) != (q.shape[1],) or sinks.dtype != torch.float32:
            raise ValueError(
                f"sinks is {sinks.dtype} {tuple(sinks.shape)}: float32 [{q.shape[1]}] is wanted"
            )
        tensors.append(("sinks", sinks))
    for name, x in tensors:
        if x.device != q.device or not x.is_contiguous():
            raise ValueError(
                f"{name} is on {x.device}, strides {x.stride()}: contiguous on {q.device} is wanted"
            )


def _check_batch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
) -> None:
    if page_table.ndim != 2:
        raise ValueError(f"page_table is {tuple(page_table.shape)}: [B, L] is wanted")
    requests, width = page_table.shape
    wanted = {
        "page_table": (page_table, (requests, width)),
        "query_start": (query_start, (requests + 1,)),
        "seq_lens": (seq_lens, (requests,)),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}: contiguous int32 {shape} is wanted"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}: {q.device} is wanted")
    if not 1 <= max_query_len <= max_seq_len and q.shape[0]:
        raise ValueError(
            f"max_query_len {max_query_len} and max_seq_len {max_seq_len}: "
            "1 <= max_query_len <= max_seq_len is wanted"
        )
    if max_seq_len > width * k_pages.shape[1]:
        raise ValueError(
            f"max_seq_len is {max_seq_len}: page_table holds {width} pages of {k_pages.shape[1]}"
        )
