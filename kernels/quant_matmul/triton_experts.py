"""Mixture-of-experts matmul with packed weights: rows gathered per expert into fixed tiles.

Rows are sorted by expert without moving them: a tile is up to BLOCK_M entries of the sorted order
that belong to one expert. The number of tiles launched is a bound that needs no look at the ids, so
nothing waits for the GPU; tiles beyond the real ones return at once. All tiles have the same size,
and a row's result does not depend on its place in one, so its bits depend on that row alone.

Shapes: M rows, K inputs, N outputs, E experts, T tiles. x [M, K], out [M, N], planes [E * N, ...].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.configs import Config, block_k, default
from oxillama_torch.kernels.quant_matmul.triton_gemm import tile_product
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    dot_dtype,
    launch_device,
    pdl_begin,
    pdl_options,
    priority,
)

__all__ = ["experts_kernel", "launch", "plan_tiles"]


@triton.jit
def experts_kernel(
    x, x_stride, p0, p1, p2, p3, s0, s1, s2, s3, out, N, K,
    order, tile_expert, tile_start, expert_start, E,
    DECODE: tl.constexpr, DOT_DTYPE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs of tile i for the rows of tile j of the sorted order."""
    pdl_begin(USE_PDL)
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert >= E:
        return
    place = tl.load(tile_start + tl.program_id(1)) + tl.arange(0, BLOCK_M)
    m_mask = place < tl.load(expert_start + expert + 1)
    m = tl.load(order + place, mask=m_mask, other=0)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tile_product(
        x, x_stride, m, m_mask, p0, p1, p2, p3, s0, s1, s2, s3, expert * N + n, n < N, K,
        DECODE, DOT_DTYPE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mask = (n < N)[:, None] & m_mask[None, :]
    tl.store(out + m[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=mask)


def plan_tiles(
    expert_ids: torch.Tensor, num_experts: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by expert and cut each expert's rows into tiles, without waiting for the device.

    Args:
        expert_ids: int64 [M].

    Returns:
        order int64 [M]: row numbers sorted by expert; tile_expert int64 [T]: E where a tile is
        not used; tile_start int64 [T]: its first place in ``order``; expert_start int64 [E + 1]:
        the first place of each expert.
    """
    device = expert_ids.device
    rows = expert_ids.shape[0]
    tiles = min(rows, rows // block_m + num_experts)
    sorted_ids, order = expert_ids.sort(stable=True)
    expert_start = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=device))
    tiles_end = ((expert_start.diff() + block_m - 1) // block_m).cumsum(0)
    tile = torch.arange(tiles, device=device)
    tile_expert = torch.searchsorted(tiles_end, tile, right=True)
    first = torch.nn.functional.pad(tiles_end, (1, 0))
    tile_start = expert_start[tile_expert] + (tile - first[tile_expert]) * block_m
    return order, tile_expert, tile_start, expert_start


def launch(
    x: torch.Tensor,
    weight: PackedTensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    config: Config,
) -> torch.Tensor:
    """Run the kernel with one config; arguments as the op's."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), outputs = x.shape, weight.shape[0] // num_experts
    out = x.new_empty(rows, outputs)
    plan = plan_tiles(expert_ids, num_experts, config.block_m)
    tile, dot = block_k(weight.format, inputs, config.block_k), dot_dtype(x.dtype)
    with launch_device(x):
        experts_kernel[(triton.cdiv(outputs, config.block_n), len(plan[1]))](
            x, x.stride(0), *weight.tile_args(), out, outputs, inputs, *plan, num_experts,
            DECODE=weight.format.decoder(dot == tl.bfloat16), DOT_DTYPE=dot,
            EVEN_K=inputs % tile == 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=tile,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return out


@register("quant_matmul_experts", "triton", devices=DEVICES, priority=priority(0))
def quant_matmul_experts(
    x: torch.Tensor, weight: PackedTensor, expert_ids: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """One program per output tile and tile of rows."""
    return launch(x, weight, expert_ids, num_experts, default("invariant", weight.format, 1))
