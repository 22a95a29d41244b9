"""Launcher of attention over paged keys and values.

Shapes: T query tokens of B requests, Hq query heads, Hkv key/value heads (Hq a multiple), D key
head dim, Dv value head dim, P pages of S slots, L pages per row of the page table.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import kv_formats, registry

__all__ = ["attention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

registry.declare(
    "attention",
    "oxillama_torch.kernels.attention.reference",
    "oxillama_torch.kernels.attention.compiled",
    "oxillama_torch.kernels.attention.gathered",
    "oxillama_torch.kernels.attention.triton_backend",
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
    slopes: torch.Tensor | None = None,
    numerics: str = "invariant",
) -> torch.Tensor:
    """``softmax(mask(cap(scale * q k^T) + slope * distance)) v``, causal, over pages.

    Query row j of request b sits at position ``seq_lens[b] - (query_start[b+1] - query_start[b])
    + j`` and sees the keys at positions up to its own, or the last ``window`` of those. ``cap(x)``
    is ``softcap * tanh(x / softcap)``. A sink is one more logit per head in the softmax, without
    a value. ALiBi's ``distance`` is the key's position less the query's: 0 and below.

    Args:
        q: float32, bfloat16 or float16 [T, Hq, D], contiguous.
        k_pages, v_pages: float32, bfloat16, float16 or float8_e4m3fn [P, S, Hkv, D] and
            [P, S, Hkv, Dv], or q8_0 or q4_0 as ``kv_formats`` lays it out; contiguous, S a power
            of two.
        page_table: int32 [B, L]; entry [b, i] is the page of positions i*S to i*S+S-1. Entries
            past a request's last page are not read.
        query_start: int32 [B + 1], from 0 to T.
        seq_lens: int32 [B], tokens of each request including those of q.
        scale: usually ``D ** -0.5``.
        max_query_len: at least the most query tokens of a request; max_seq_len: at least
            the greatest of seq_lens. Known on the host, so that launching needs no synchronisation.
        window: positions a query sees, itself included; None: all.
        softcap: None for none.
        sinks, slopes: float32 [Hq] or None.
        numerics: ``"invariant"`` (a row's bits depend on its own request's tokens alone, not on
            chunking, batch or pages) or ``"fast"``.

    Returns:
        [T, Hq, Dv] in q's dtype.

    Raises:
        ValueError: an operand or a number does not fit; says got and wanted.

    Source: Vaswani et al., arXiv 1706.03762; paging: Kwon et al., arXiv 2309.06180; slopes: Press
    et al., ALiBi, arXiv 2108.12409.
    """
    _check_heads(q, k_pages, v_pages, {"sinks": sinks, "slopes": slopes})
    _check_batch(q, k_pages, page_table, query_start, seq_lens, max_query_len, max_seq_len)
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, wanted a positive number")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, wanted None or at least 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, wanted None or a positive number")
    if q.shape[0] == 0:
        format = kv_formats.format_of(k_pages, q.shape[2])
        return q.new_empty(0, q.shape[1], format.dim(v_pages.shape[3]))
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
        slopes=slopes,
    )


def _check_heads(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    per_head: dict[str, torch.Tensor | None],
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q: got {tuple(q.shape)}, wanted (T, HQ, D)")
    if k_pages.ndim != 4:
        raise ValueError(f"k_pages: got {tuple(k_pages.shape)}, wanted (P, S, HKV, {q.shape[2]})")
    pages, page_size, kv_heads, _ = k_pages.shape
    if v_pages.ndim != 4 or v_pages.shape[:3] != k_pages.shape[:3]:
        wanted = f"({pages}, {page_size}, {kv_heads}, DV)"
        raise ValueError(f"v_pages: got {tuple(v_pages.shape)}, wanted {wanted}")
    if page_size & (page_size - 1):
        raise ValueError(f"k_pages: got {page_size} slots a page, wanted a power of two")
    if q.shape[1] % kv_heads:
        raise ValueError(f"q: got {q.shape[1]} heads, wanted a multiple of {kv_heads}")
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        known = x.dtype in _DTYPES or x is not q
        if not known or x.device != q.device or not x.is_contiguous():
            got = f"{x.dtype} with strides {x.stride()} on {x.device}"
            wanted = f"a contiguous floating dtype on {q.device}"
            raise ValueError(f"{name}: got {got}, wanted {wanted}")
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"v_pages: got {v_pages.dtype}, wanted {k_pages.dtype} like k_pages")
    format = kv_formats.format_of(k_pages, q.shape[2])
    if format.dim(v_pages.shape[3]) is None:
        wanted = f"a multiple of {format.elements}"
        raise ValueError(f"v_pages: got {v_pages.shape[3]} elements a head, wanted {wanted}")
    for name, x in per_head.items():
        if x is not None:
            _check_table(name, x, torch.float32, (q.shape[1],), q.device)


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
        raise ValueError(f"page_table: got {tuple(page_table.shape)}, wanted (B, L)")
    requests, width = page_table.shape
    _check_table("page_table", page_table, torch.int32, (requests, width), q.device)
    _check_table("query_start", query_start, torch.int32, (requests + 1,), q.device)
    _check_table("seq_lens", seq_lens, torch.int32, (requests,), q.device)
    if q.shape[0] and max_query_len < 1:
        raise ValueError(f"max_query_len: got {max_query_len}, wanted at least 1")
    if not max_query_len <= max_seq_len <= width * k_pages.shape[1]:
        wanted = f"{max_query_len} to {width} pages of {k_pages.shape[1]}"
        raise ValueError(f"max_seq_len: got {max_seq_len}, wanted {wanted}")


def _check_table(
    name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{name}: got {got}, wanted contiguous {dtype} {shape}")
    if x.device != device:
        raise ValueError(f"{name}: got {x.device}, wanted {device}")
