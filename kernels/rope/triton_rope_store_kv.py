"""Rotary embedding and KV store in one pass, with qk-norm where the model has it.

A program serves one head of one token: a query head is rotated into the output, a key head into its
page, and takes the value head of the same number along.

Shapes: T tokens, HQ query heads, HKV key/value heads, D key head dim, DV value head dim, PAIRS
rotated pairs of a head, A axes. q [T, HQ, D], k [T, HKV, D], v [T, HKV, DV] with token strides,
pages [P * S, HKV, D or DV], out [T, HQ, D], positions [T], or [A, T] with axes [PAIRS].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.kv_formats import find, raw
from oxillama_torch.kernels.kv_tile import kv_kind, store_head
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    Variant,
    launch_device,
    pdl_begin,
    pdl_options,
    priority,
)

__all__ = ["rope_store_kv", "rope_store_kv_kernel", "variants"]


@triton.jit
def _rotate_head(
    source, target, norm, inv_freq, position, mscale, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, NEOX: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Norm, rotate and store one head of D contiguous elements."""
    d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = source.dtype.element_ty
    scale = 1.0
    if HAS_NORM:
        whole = tl.load(source + d, mask=d < D, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, axis=0) / D + eps)
    if PAIRS > 0:
        i = tl.arange(0, BLOCK_P)
        inside = i < PAIRS
        first = i if NEOX else 2 * i
        second = i + PAIRS if NEOX else 2 * i + 1
        a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            a *= scale * tl.load(norm + first, mask=inside, other=0.0)
            b *= scale * tl.load(norm + second, mask=inside, other=0.0)
        angle = position * tl.load(inv_freq + i, mask=inside, other=0.0)
        cos = tl.cos(angle) * mscale
        sin = tl.sin(angle) * mscale
        # Rounded to the dtype of the activations first, then to that of the pages.
        turned_a = (a * cos - b * sin).to(dtype)
        turned_b = (b * cos + a * sin).to(dtype)
        tl.store(target + first, turned_a.to(target.dtype.element_ty), mask=inside)
        tl.store(target + second, turned_b.to(target.dtype.element_ty), mask=inside)
    if 2 * PAIRS < D:
        rest = (d >= 2 * PAIRS) & (d < D)
        x = tl.load(source + d, mask=rest, other=0.0)
        if HAS_NORM:
            x = (x.to(tl.float32) * scale * tl.load(norm + d, mask=rest, other=0.0)).to(dtype)
        tl.store(target + d, x.to(target.dtype.element_ty), mask=rest)


@triton.jit
def _rotated_head(
    source, norm, inv_freq, positions, axes, axis_stride, token, mscale, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, NEOX: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_AXES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Norm and rotate one head: float32 [BLOCK_D], rounded to the dtype of the activations.

    Every dim fetches its partner, for groups of neighbours are to be packed together.
    """
    d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = source.dtype.element_ty
    x = tl.load(source + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x *= scale * tl.load(norm + d, mask=d < D, other=0.0)
    if PAIRS > 0:
        turned = d < 2 * PAIRS
        pair = d % PAIRS if NEOX else d // 2
        ahead = d < PAIRS if NEOX else d % 2 == 0
        partner = tl.where(ahead, d + (PAIRS if NEOX else 1), d - (PAIRS if NEOX else 1))
        y = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
        if HAS_NORM:
            y *= scale * tl.load(norm + partner, mask=turned, other=0.0)
        at = positions + token
        if HAS_AXES:
            at += tl.load(axes + pair, mask=turned, other=0) * axis_stride
        angle = tl.load(at).to(tl.float32) * tl.load(inv_freq + pair, mask=turned, other=0.0)
        sin = tl.sin(angle) * mscale
        rotated = x * (tl.cos(angle) * mscale) + y * tl.where(ahead, -sin, sin)
        x = tl.where(turned, rotated, x)
    return x.to(dtype).to(tl.float32)


@triton.jit
def rope_store_kv_kernel(
    q, k, v, positions, axes, inv_freq, q_norm, k_norm, k_pages, v_pages, slot_mapping, out,
    q_stride, k_stride, v_stride, axis_stride, mscale, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    ROW_K: tl.constexpr, ROW_V: tl.constexpr,
    NEOX: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr, HAS_AXES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_P: tl.constexpr, KV: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head): query heads first, key and value heads after them."""
    pdl_begin(USE_PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if HAS_AXES:
        i = tl.arange(0, BLOCK_P)
        axis = tl.load(axes + i, mask=i < PAIRS, other=0)
        position = tl.load(positions + axis * axis_stride + token).to(tl.float32)
    else:
        position = tl.load(positions + token).to(tl.float32)
    if head < HQ:
        _rotate_head(
            q + token * q_stride + head * D, out + (token * HQ + head) * D, q_norm, inv_freq,
            position, mscale, eps, D, PAIRS, NEOX, NORM_Q, BLOCK_D, BLOCK_P,
        )  # fmt: skip
        return
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head -= HQ
    cell = slot * HKV + head
    d = tl.arange(0, BLOCK_DV)
    value = tl.load(v + token * v_stride + head * DV + d, mask=d < DV, other=0.0)
    if KV != "plain":
        key = _rotated_head(
            k + token * k_stride + head * D, k_norm, inv_freq, positions, axes, axis_stride, token,
            mscale, eps, D, PAIRS, NEOX, NORM_K, HAS_AXES, BLOCK_D,
        )  # fmt: skip
        store_head(k_pages + cell * ROW_K, key, D, BLOCK_D, KV)
        store_head(v_pages + cell * ROW_V, value.to(tl.float32), DV, BLOCK_DV, KV)
        return
    _rotate_head(
        k + token * k_stride + head * D, k_pages + cell * D, k_norm, inv_freq,
        position, mscale, eps, D, PAIRS, NEOX, NORM_K, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    tl.store(v_pages + cell * DV + d, value.to(v_pages.dtype.element_ty), mask=d < DV)


@register("rope_store_kv", "triton", devices=DEVICES, priority=priority(1))
def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    mscale: float,
    style: str,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    axes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Triton backend of :func:`oxillama_torch.kernels.rope.op.rope_store_kv`."""
    tokens, heads, dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    pairs = inv_freq.shape[0]
    out = q.new_empty(tokens, heads, dim)
    with launch_device(q):
        rope_store_kv_kernel[(tokens, heads + kv_heads)](
            q, k, v, positions, positions if axes is None else axes, inv_freq,
            inv_freq if q_norm is None else q_norm, inv_freq if k_norm is None else k_norm,
            raw(k_pages), raw(v_pages), slot_mapping, out,
            q.stride(0), k.stride(0), v.stride(0), 0 if axes is None else tokens, mscale, norm_eps,
            HQ=heads, HKV=kv_heads, D=dim, DV=value_dim, ROW_K=k_pages.shape[3],
            ROW_V=v_pages.shape[3], KV=kv_kind(k_pages, dim), PAIRS=pairs, NEOX=style == "neox",
            NORM_Q=q_norm is not None, NORM_K=k_norm is not None, HAS_AXES=axes is not None,
            BLOCK_D=triton.next_power_of_2(dim), BLOCK_DV=triton.next_power_of_2(value_dim),
            BLOCK_P=triton.next_power_of_2(max(1, pairs)), num_warps=1,
            **pdl_options(q.device),
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """The compiled forms, for counting without a GPU what they take."""
    tensors = dict.fromkeys(("q", "k", "v", "k_pages", "v_pages", "out"), "*bf16")
    tensors |= dict.fromkeys(("positions", "axes", "slot_mapping"), "*i64")
    tensors |= dict.fromkeys(("inv_freq", "q_norm", "k_norm"), "*fp32")
    strides = dict.fromkeys(("q_stride", "k_stride", "v_stride", "axis_stride"), "i32")
    floats = dict.fromkeys(("mscale", "eps"), "fp32")
    return [
        Variant(
            f"rope-{'neox' if neox else 'norm'}-{dim}-{pairs}"
            f"{'-qknorm' if norm else ''}{'-axes' if axes else ''}"
            f"{'' if kv == 'plain' else '-' + kv}",
            rope_store_kv_kernel,
            tensors
            | ({} if kv == "plain" else {"k_pages": "*u8", "v_pages": "*u8"})
            | strides
            | floats,
            {"HQ": 32, "HKV": 8, "D": dim, "DV": dim, "PAIRS": pairs, "NEOX": neox}
            | {"NORM_Q": norm, "NORM_K": norm, "HAS_AXES": axes}
            | {"BLOCK_D": dim, "BLOCK_DV": dim, "KV": kv}
            | dict.fromkeys(("ROW_K", "ROW_V"), dim if kv == "plain" else find(kv, None).row(dim))
            | {"BLOCK_P": triton.next_power_of_2(pairs)},
            (*tensors, *strides),
            num_warps=1,
        )
        for neox, dim, pairs, norm, axes, kv in (
            (False, 128, 64, False, False, "plain"),
            (True, 64, 32, False, False, "plain"),
            (True, 128, 64, True, False, "plain"),
            (True, 128, 48, True, False, "plain"),
            (True, 128, 64, True, True, "plain"),
            (True, 128, 64, True, False, "fp8"),
            (False, 128, 64, False, False, "q8_0"),
            (True, 128, 48, True, True, "q4_0"),
        )
    ]
