"""Embedding lookup in a packed table: each program decodes one tile of the rows asked for.

Shapes: T tokens, V rows of the table, K features. ids [T], out [T, K], planes [V, ...].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.configs import block_k
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    launch_device,
    pdl_begin,
    pdl_options,
    priority,
)

__all__ = ["embedding", "embedding_kernel"]

BLOCK_T = 4
BLOCK_K = 256
NUM_WARPS = 1


@triton.jit
def embedding_kernel(
    ids, p0, p1, p2, p3, s0, s1, s2, s3, out, T, K,
    DECODE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): features of tile j for tokens of tile i."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    pdl_begin(USE_PDL)
    rows = tl.load(ids + t, mask=t < T, other=0)
    k0 = tl.program_id(1) * BLOCK_K
    w = DECODE(p0, p1, p2, p3, s0, s1, s2, s3, rows, t < T, k0, K, BLOCK_T, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)
    mask = (t < T)[:, None] & (k < K)[None, :]
    tl.store(out + t[:, None] * K + k[None, :], w.to(out.dtype.element_ty), mask=mask)


@register("embedding", "triton", devices=DEVICES, priority=priority(0))
def embedding(ids: torch.Tensor, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Only the planes' parts that belong to the rows are read."""
    ids = ids.contiguous()
    tokens, features = len(ids), weight.shape[1]
    out = torch.empty(tokens, features, dtype=dtype, device=ids.device)
    tile = block_k(weight.format, features, BLOCK_K)
    grid = (triton.cdiv(tokens, BLOCK_T), triton.cdiv(features, tile))
    with launch_device(ids):
        embedding_kernel[grid](
            ids, *weight.tile_args(), out, tokens, features,
            DECODE=weight.format.decode_tile,
            BLOCK_T=BLOCK_T, BLOCK_K=tile, num_warps=NUM_WARPS,
            **pdl_options(ids.device),
        )  # fmt: skip
    return out
