"""Rotary embedding and KV store in eager torch.

Shapes: T tokens, H heads (Hq or Hkv), D key head dim, Dv value head dim, R = rope_dim / 2 pairs,
P pages of S slots.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels.kv_formats import encode, format_of, raw
from oxillama_torch.kernels.registry import register

__all__ = ["norm_heads", "rope_store_kv", "rotate"]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """Rotate the first 2R dims of every head.

    Args:
        x: float32 [T, H, D].
        cos, sin: float32 [T, 1, R].
        style: ``"norm"`` or ``"neox"``.
    """
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if style == "norm":
        a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    first, second = a * cos - b * sin, b * cos + a * sin
    if style == "norm":
        return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([first, second, rest], dim=-1)


def norm_heads(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _store(pages: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    encoded = encode(rows, format_of(pages, rows.shape[2]))
    raw(pages).flatten(0, 1).index_copy_(0, slots, raw(encoded))


@register("rope_store_kv", "reference")
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
    """Rotate q and k, store k and v; a token's bits depend on that token alone.

    Args and errors: as ``op.rope_store_kv``, which checks them.
    """
    turned_by = positions[:, None] if axes is None else positions[axes].T  # [T, 1 or R]
    angles = turned_by.float()[:, None] * inv_freq
    cos, sin = torch.cos(angles) * mscale, torch.sin(angles) * mscale
    q_wide = norm_heads(q.float(), q_norm, norm_eps)
    k_wide = norm_heads(k.float(), k_norm, norm_eps)
    k_rotated = rotate(k_wide, cos, sin, style).to(k.dtype)
    stored = slot_mapping >= 0
    if not bool(stored.all()):
        k_rotated, v, slot_mapping = k_rotated[stored], v[stored], slot_mapping[stored]
    _store(k_pages, k_rotated, slot_mapping)
    _store(v_pages, v, slot_mapping)
    return rotate(q_wide, cos, sin, style).to(q.dtype)
