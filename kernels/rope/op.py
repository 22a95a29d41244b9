"""Launcher of rotary embedding and KV store: rotate q and k, write k and v into their pages.

Shapes: T tokens, Hq query heads, Hkv key/value heads, D key head dim, Dv value head dim, P pages
of S slots each, A axes of positions. A slot is page * S + offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oxillama_torch.kernels import kv_formats, registry

__all__ = ["STYLES", "rope_store_kv", "section_axes"]

STYLES = ("norm", "neox")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

registry.declare(
    "rope_store_kv",
    "oxillama_torch.kernels.rope.reference",
    "oxillama_torch.kernels.rope.compiled",
    "oxillama_torch.kernels.rope.triton_rope_store_kv",
)


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
    numerics: str = "invariant",
) -> torch.Tensor:
    """Rotate pairs (a, b) by ``angle = position * inv_freq``: ``(a cos - b sin, b cos + a sin)``.

    Cosine and sine are multiplied by ``mscale``. Only the first ``2 * len(inv_freq)`` dims of a
    head are rotated; with an empty ``inv_freq`` nothing is. Angles and rotation are float32.

    Args:
        q: float32, bfloat16 or float16 [T, Hq, D].
        k, v: [T, Hkv, D] and [T, Hkv, Dv] in q's dtype. Heads of q, k and v must be contiguous;
            tokens may be strided (slices of one fused projection).
        positions: int64 [T], absolute; [A, T] with ``axes``.
        inv_freq: float32 [rope_dim / 2], radians per position.
        mscale: yarn's attention factor, 1.0 otherwise.
        style: ``"norm"`` pairs (2i, 2i+1), ``"neox"`` pairs (i, i + rope_dim / 2).
        k_pages, v_pages: [P, S, Hkv, D] and [P, S, Hkv, Dv], contiguous; written in their dtype,
            or packed as ``kv_formats`` says.
        slot_mapping: int64 [T]; -1: do not store this token.
        q_norm, k_norm: float32 [D]: RMSNorm of each head before the rotation (qk-norm).
        norm_eps: of that norm.
        axes: int64 [rope_dim / 2], below A: which of a token's positions turns each pair, see
            ``section_axes`` (multimodal rope); None: tokens have one position.
        numerics: ``"invariant"`` or ``"fast"``.

    Returns:
        Rotated q, contiguous [T, Hq, D] in q's dtype. ``k_pages`` and ``v_pages`` change in place.

    Raises:
        ValueError: an operand does not fit, or the style is unknown; says got and wanted.

    Source: Su et al., RoFormer, arXiv 2104.09864; mscale: Peng et al., YaRN, arXiv 2309.00071;
    axes: Wang et al., Qwen2-VL, arXiv 2409.12191.
    """
    if style not in STYLES:
        raise ValueError(f"style: got {style!r}, wanted one of {', '.join(STYLES)}")
    _check_heads(q, k, v)
    _check_tokens(q, positions, slot_mapping, inv_freq, axes)
    _check_pages(k, v, k_pages, v_pages)
    _check_tables(q, inv_freq, q_norm, k_norm)
    if q.shape[0] == 0:
        return q.new_empty(q.shape)
    call = registry.Call(q.device.type, q.dtype, numerics, m=q.shape[0])
    return registry.select("rope_store_kv", call).function(
        q,
        k,
        v,
        positions,
        inv_freq,
        mscale,
        style,
        k_pages,
        v_pages,
        slot_mapping,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        axes=axes,
    )


def section_axes(sections: Sequence[int], *, interleaved: bool = False) -> torch.Tensor:
    """Which position turns each pair of dimensions, for ``rope_store_kv``: int64 [sum(sections)].

    Args:
        sections: pairs of each axis, ``<arch>.rope.dimension_sections``: time, height and width.
        interleaved: axes take turns until theirs are used up, and what is left is the first one's
            (Qwen3-VL); else one section follows the other (Qwen2-VL).

    Raises:
        ValueError: a section is negative, or interleaved ones do not fit.
    """
    if any(count < 0 for count in sections):
        raise ValueError(f"sections: got {list(sections)}, wanted none below 0")
    total = sum(sections)
    if not interleaved:
        counts = torch.tensor(list(sections), dtype=torch.int64)
        return torch.arange(len(sections)).repeat_interleave(counts)
    axes = torch.zeros(total, dtype=torch.int64)
    turns = len(sections)
    for axis, count in enumerate(sections[1:], start=1):
        if count and (count - 1) * turns + axis >= total:
            raise ValueError(f"sections: got {list(sections)}, which cannot take turns")
        axes[axis : count * turns : turns] = axis
    return axes


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name}: got {tuple(x.shape)}, wanted (T, heads, dim)")
        if x.dtype not in _DTYPES or (x.dtype, x.device) != (q.dtype, q.device):
            wanted = f"{q.dtype} on {q.device}" if x is not q else "float32, bfloat16 or float16"
            raise ValueError(f"{name}: got {x.dtype} on {x.device}, wanted {wanted}")
        if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
            raise ValueError(f"{name}: got strides {x.stride()}, wanted contiguous heads")
    tokens, _, dim = q.shape
    if (k.shape[0], k.shape[2]) != (tokens, dim):
        raise ValueError(f"k: got {tuple(k.shape)}, wanted ({tokens}, HKV, {dim})")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: got {tuple(v.shape)}, wanted ({tokens}, {k.shape[1]}, DV)")


def _check_tokens(
    q: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    inv_freq: torch.Tensor,
    axes: torch.Tensor | None,
) -> None:
    tokens = (q.shape[0],)
    _check_table("slot_mapping", slot_mapping, torch.int64, tokens, q.device)
    if axes is not None:
        _check_table("axes", axes, torch.int64, inv_freq.shape, q.device)
        if positions.ndim != 2:
            raise ValueError(f"positions: got {tuple(positions.shape)}, wanted (A, {q.shape[0]})")
        tokens = (positions.shape[0], *tokens)
    _check_table("positions", positions, torch.int64, tokens, q.device)


def _check_pages(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
) -> None:
    for name, pages, x in (("k_pages", k_pages, k), ("v_pages", v_pages, v)):
        if pages.ndim != 4 or pages.shape[2] != x.shape[1] or not pages.is_contiguous():
            wanted = f"contiguous (P, S, {x.shape[1]}, {x.shape[2]})"
            raise ValueError(f"{name}: got {tuple(pages.shape)}, wanted {wanted}")
        if pages.device != x.device:
            raise ValueError(f"{name}: got pages on {pages.device}, wanted {x.device}")
    wanted = kv_formats.format_of(k_pages, k.shape[2], "k_pages").name
    got = kv_formats.format_of(v_pages, v.shape[2], "v_pages").name
    if got != wanted:
        raise ValueError(f"v_pages: got {got}, wanted {wanted} like k_pages")
    if k_pages.shape[:2] != v_pages.shape[:2]:
        got, wanted = (f"P, S = {tuple(p.shape[:2])}" for p in (v_pages, k_pages))
        raise ValueError(f"v_pages: got {got}, wanted {wanted} like k_pages")


def _check_tables(
    q: torch.Tensor,
    inv_freq: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    dim = q.shape[2]
    if inv_freq.ndim != 1 or 2 * inv_freq.shape[0] > dim:
        got = f"{inv_freq.dtype} {tuple(inv_freq.shape)}"
        raise ValueError(
            f"inv_freq: got {got}, wanted torch.float32 (n,) with n at most {dim // 2}"
        )
    _check_table("inv_freq", inv_freq, torch.float32, inv_freq.shape, q.device)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _check_table(name, weight, torch.float32, (dim,), q.device)


def _check_table(
    name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or not x.is_contiguous():
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{name}: got {got}, wanted contiguous {dtype} {tuple(shape)}")
    if x.device != device:
        raise ValueError(f"{name}: got {x.device}, wanted {device}")
