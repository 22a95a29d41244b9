"""Rotary embedding and KV store of few tokens on a CPU as one loop.

Shapes: T tokens, Hq query heads, Hkv key/value heads, D key head dim, Dv value head dim,
R = rope_dim / 2 pairs, P pages of S slots each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from oxillama_torch.kernels.few_rows import MAX_ROWS, OPTIONS, Readiness
from oxillama_torch.kernels.program import Program
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.rope import reference

__all__ = ["PAGE_DTYPES", "prepare", "rope_store_kv"]

_readiness = Readiness("rope_store_kv")
#: Of pages that compiled code writes; other ones pack or cut what they hold.
PAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Form(NamedTuple):
    """What a program is made for."""

    style: str
    pairs: int
    normed: tuple[bool, bool]
    dim: int
    value_dim: int
    page_size: int
    page_dtype: torch.dtype


@register(
    "rope_store_kv",
    "compiled",
    devices=("cpu",),
    numerics=("fast",),
    m=(1, MAX_ROWS),
    capability=_readiness.cannot,
    unless_asked=_readiness.not_by_default,
    priority=2,
)
def rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    mscale: float,
    style: str,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    axes: Tensor | None = None,
) -> Tensor:
    """Arguments as those of :func:`oxillama_torch.kernels.rope.op.rope_store_kv`.

    Tokens with several positions, tokens that are not stored and packed pages are left to the
    reference.
    """
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    if axes is not None or k_pages.dtype not in PAGE_DTYPES or min(slot_mapping.tolist()) < 0:
        return reference.rope_store_kv(
            q, k, v, positions, inv_freq, mscale, style, k_pages, v_pages, slot_mapping,
            q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps, axes=axes,
        )  # fmt: skip
    form = _Form(
        style, len(inv_freq), (q_norm is not None, k_norm is not None), q.shape[2], v.shape[2],
        k_pages.shape[1], k_pages.dtype,
    )  # fmt: skip
    run = _program(form)
    rows = (x.contiguous() for x in (q, k, v))
    return run(*rows, positions, inv_freq, _scalars(mscale, norm_eps), k_pages, v_pages,
               slot_mapping, *norms)  # fmt: skip


def prepare(
    *,
    style: str,
    pairs: int,
    normed: tuple[bool, bool],
    dim: int,
    value_dim: int,
    page_size: int,
    page_dtype: torch.dtype,
    even_if_small: bool,
) -> None:
    """Compile a layer's rotation.

    Args:
        style: as in ``op.rope_store_kv``.
        pairs: R.
        normed: whether heads of q, and those of k, are normed.
        dim, value_dim: D and Dv.
        page_size, page_dtype: of the pages.
        even_if_small: also where no rule asks for this backend.
    """
    if page_dtype not in PAGE_DTYPES or not _readiness.wanted(even_if_small):
        return
    form = _Form(style, pairs, normed, dim, value_dim, page_size, page_dtype)
    _readiness.prepare(form, *(functools.partial(_sample, f, form) for f in _KERNELS))


_KERNELS = (rope_store_kv, reference.rope_store_kv)


def _sample(kernel, form: _Form) -> Tensor:
    """What a kernel returns and writes for two tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, dim, generator=generator)
        for heads, dim in ((6, form.dim), (3, form.dim), (3, form.value_dim))
    )
    pages = [
        torch.zeros(2, form.page_size, 3, dim, dtype=form.page_dtype)
        for dim in (form.dim, form.value_dim)
    ]
    norm = torch.rand(form.dim, generator=generator)
    inv_freq = torch.rand(form.pairs, generator=generator)
    q_norm, k_norm = (norm if given else None for given in form.normed)
    slots = torch.tensor([2 * form.page_size - 1, 0])
    rotated = kernel(
        q, k, v, torch.tensor([5, 40]), inv_freq, 1.25, form.style, *pages, slots,
        q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip
    return torch.cat([x.float().flatten() for x in (rotated, *pages)])


@functools.cache
def _program(form: _Form) -> Program:
    def run(q, k, v, positions, inv_freq, scalars, k_pages, v_pages, slots, *norms):
        mscale, eps = scalars
        angles = positions.float()[:, None, None] * inv_freq
        cos, sin = torch.cos(angles) * mscale, torch.sin(angles) * mscale
        left = list(norms)
        if form.normed[0]:
            q = reference.norm_heads(q, left.pop(0), eps)
        if form.normed[1]:
            k = reference.norm_heads(k, left.pop(0), eps)
        k = reference.rotate(k, cos, sin, form.style)
        for pages, rows in ((k_pages, k), (v_pages, v)):
            pages.flatten(0, 1).index_put_((slots,), rows.to(pages.dtype))
        return reference.rotate(q, cos, sin, form.style)

    key, value = ("P", form.page_size, "K", form.dim), ("P", form.page_size, "K", form.value_dim)
    shapes = [
        ("T", "H", form.dim), ("T", "K", form.dim), ("T", "K", form.value_dim), ("T",),
        (form.pairs,), (2,), key, value, ("T",), *[(form.dim,)] * sum(form.normed),
    ]  # fmt: skip
    dtypes = [torch.float32] * len(shapes)
    dtypes[3] = dtypes[8] = torch.int64
    dtypes[6] = dtypes[7] = form.page_dtype
    return Program(run, f"rope_store_kv_{form.style}", shapes, dtypes=dtypes, options=OPTIONS)


@functools.cache
def _scalars(mscale: float, norm_eps: float) -> Tensor:
    """As an argument, so that one program serves all values."""
    return torch.tensor([mscale, norm_eps])
