"""Attention of single tokens on a CPU, read from the pages in place; the rest as ``gathered``.

A token of decoding is a program of its own: scores, softmax and the sum of values in three loops
over the keys' pages, the KV heads shared among threads. Prompts are bound by products, which
torch's fused kernel does best. The compiler picks the order of additions: ``fast`` alone.

Shapes: T query tokens of B requests; H query heads, Hkv key/value heads, G = H / Hkv, D key head
dim, Dv value head dim, P pages of S slots; L pages that the token sees.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from oxillama_torch.kernels.attention import gathered
from oxillama_torch.kernels.few_rows import MAX_ROWS, OPTIONS, Readiness
from oxillama_torch.kernels.program import Program
from oxillama_torch.kernels.registry import register

__all__ = ["PAGE_DTYPES", "attention", "prepare"]

_readiness = Readiness("attention")
#: Of pages that compiled code reads; others are widened first.
PAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Form(NamedTuple):
    """What a program is made for."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    page_size: int
    page_dtype: torch.dtype
    scale: float
    window: int | None


@register(
    "attention",
    "compiled",
    devices=("cpu",),
    numerics=("fast",),
    m=(1, MAX_ROWS),
    capability=_readiness.cannot,
    unless_asked=_readiness.not_by_default,
    priority=130,
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
    extras = softcap is not None or sinks is not None or slopes is not None
    if max_query_len > 1 or len(q) != len(seq_lens) or extras or k_pages.dtype not in PAGE_DTYPES:
        return gathered.attention(
            q, k_pages, v_pages, page_table, query_start, seq_lens, scale=scale, window=window,
            max_query_len=max_query_len, max_seq_len=max_seq_len,
            softcap=softcap, sinks=sinks, slopes=slopes,
        )  # fmt: skip
    (_, page_size, kv_heads, dim), value_dim = k_pages.shape, v_pages.shape[3]
    form = _Form(q.shape[1], kv_heads, dim, value_dim, page_size, k_pages.dtype, scale, window)
    run = _program(form)
    rows = []
    # select and narrow take half the time of indexing, once per layer and token.
    for row, length in enumerate(seq_lens.tolist()):
        first = 0 if window is None else max(0, length - window) // page_size  # page with a key
        pages = page_table.select(0, row).narrow(0, first, -(-length // page_size) - first)
        end = seq_lens.narrow(0, row, 1)
        if first:
            end = end - first * page_size
        rows.append(run(q.narrow(0, row, 1), k_pages, v_pages, pages, end))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def prepare(
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    page_size: int,
    page_dtype: torch.dtype,
    scale: float,
    window: int | None,
    even_if_small: bool,
) -> None:
    """Compile a layer's attention.

    Args:
        heads, kv_heads, dim, value_dim: H, Hkv, D and Dv.
        page_size, page_dtype: of the pages.
        scale: of the scores.
        window: tokens that are seen; None: all.
        even_if_small: also where no rule asks for this backend.
    """
    if page_dtype not in PAGE_DTYPES or not _readiness.wanted(even_if_small):
        return
    form = _Form(heads, kv_heads, dim, value_dim, page_size, page_dtype, scale, window)
    kernels = (attention, gathered.attention)
    _readiness.prepare(form, *(functools.partial(_sample, kernel, form) for kernel in kernels))


def _sample(kernel, form: _Form) -> Tensor:
    """Two tokens, of which one sees several pages and the other one slot of its second."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, form.heads, form.dim, generator=generator)
    pages = [
        torch.randn(5, form.page_size, form.kv_heads, dim, generator=generator).to(form.page_dtype)
        for dim in (form.dim, form.value_dim)
    ]
    table = torch.tensor([[4, 2, 0], [1, 3, 3]], dtype=torch.int32)
    lengths = torch.tensor([3 * form.page_size - 1, form.page_size + 1], dtype=torch.int32)
    return kernel(
        q, *pages, table, torch.arange(3, dtype=torch.int32), lengths, scale=form.scale,
        max_query_len=1, max_seq_len=3 * form.page_size, window=form.window,
    )  # fmt: skip


@functools.cache
def _program(form: _Form) -> Program:
    group = form.heads // form.kv_heads

    def run(q_1HD: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, end: Tensor) -> Tensor:
        pages = pages.long()
        q = (q_1HD[0] * form.scale).unflatten(0, (form.kv_heads, group))[:, :, None, None]
        k = k_pages[pages].float().permute(2, 0, 1, 3)[:, None]  # [Hkv, 1, L, S, D]
        scores = (q * k).sum(-1)
        at = torch.arange(pages.shape[0])[:, None] * form.page_size + torch.arange(form.page_size)
        shown = at < end  # [L, S]
        if form.window is not None:
            shown = shown & (at >= end - form.window)
        scores = torch.where(shown, scores, -torch.inf)
        weights = torch.exp(scores - scores.amax((-1, -2), keepdim=True))  # [Hkv, G, L, S]
        # The slots of a page one by one: its number is then looked up once for all of them.
        full = [
            weights[:, :, :-1, slot, None]
            * v_pages[pages[:-1], slot].float().transpose(0, 1)[:, None]
            for slot in range(form.page_size)
        ]
        total = functools.reduce(torch.add, full).sum(2)  # [Hkv, G, Dv]
        # In the last page a weight of zero is not enough: what was never written may be NaN.
        rest = torch.where(shown[-1, :, None, None], v_pages[pages[-1:]][0].float(), 0)
        total = total + (weights[:, :, -1, :, None] * rest.transpose(0, 1)[:, None]).sum(2)
        return (total / weights.sum((-1, -2))[..., None]).flatten(0, 1)[None]

    key, value = (("P", form.page_size, form.kv_heads, dim) for dim in (form.dim, form.value_dim))
    floats, ints = form.page_dtype, torch.int32
    return Program(
        run,
        "attention_of_a_token",
        [(1, form.heads, form.dim), key, value, ("L",), (1,)],
        dtypes=[torch.float32, floats, floats, ints, ints],
        options=_OPTIONS,
    )


# One loop for the sum of values, however long; all threads, since contexts are.
_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "cpp.threads"}
_OPTIONS["cpp.enable_floating_point_contract_flag"] = "fast"
_OPTIONS |= {f"realize_{limit}_threshold": 1 << 20 for limit in ("opcount", "reads", "acc_reads")}
