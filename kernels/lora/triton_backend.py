"""Low-rank terms of adapters on a GPU: two launches, ``shrink`` and ``expand``.

Terms of all adapters of a step, of every rank, and of the layers that share an input go in one
launch: programs find their factors through the tables of addresses in ``RowGroups``. Nothing waits
for the device. With ``LineGroups`` the same launch serves any mix, as a CUDA graph wants it.

Shapes: P rows with an adapter, K inputs, R most ranks of a term, S splits of the inputs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from oxillama_torch.kernels.formats.base import ROW_ALIGNMENT
from oxillama_torch.kernels.lora.lines import LineGroups
from oxillama_torch.kernels.lora.op import MAX_PARTS, RANK_TILE, ROW_TILE, RowGroups
from oxillama_torch.kernels.lora.triton_expand import expand_kernel
from oxillama_torch.kernels.lora.triton_shrink import shrink_kernel
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    INTERPRET,
    dot_dtype,
    launch_device,
    pdl_options,
    priority,
    triton_dtype,
)

__all__ = ["BLOCK_K", "BLOCK_N", "SPLIT", "lora"]

# The same for every number of rows, so that a row's bits depend on that row alone. Interpreted,
# time goes by programs and loop turns, not by work: few large tiles.
BLOCK_N, BLOCK_K = (256, 256) if INTERPRET else (64, 128)
SPLIT = 1024


@register("lora", "triton", devices=DEVICES, priority=priority(1), takes_lines=True)
def lora(
    y: Tensor, x: Tensor, groups: RowGroups | LineGroups, first: int, sizes: tuple[int, ...]
) -> None:
    """Triton backend of :func:`oxillama_torch.kernels.lora.op.lora`, without the gains."""
    x = x if x.stride(1) == 1 else x.contiguous()
    factors = groups.dtype
    inputs, count, parts = x.shape[1], len(groups.rows), len(sizes)
    rank = groups.rank(first, parts)
    splits = triton.cdiv(inputs, SPLIT)
    h = torch.empty((splits, parts, count, rank), dtype=torch.float32, device=x.device)
    tiles = len(groups.tiles)
    options = {
        "PARTS": parts,
        "FACTOR_DTYPE": triton_dtype(factors),
        "DOT_DTYPE": dot_dtype(factors),
        "BLOCK_M": ROW_TILE,
        "BLOCK_R": RANK_TILE,
        **pdl_options(x.device),
    }
    with launch_device(x):
        shrink_kernel[(tiles, parts * splits)](
            x, x.stride(0), groups.rows, groups.tiles, first, h, count, inputs, rank,
            _row_stride(inputs, factors), SPLIT=SPLIT, BLOCK_K=BLOCK_K, **options,
        )  # fmt: skip
        expand_kernel[(triton.cdiv(max(sizes), BLOCK_N), tiles, parts)](
            h, groups.rows, groups.scales, groups.tiles, first, y, y.stride(0), count, rank,
            splits, *sizes, *(0,) * (MAX_PARTS - parts), BLOCK_N=BLOCK_N, **options,
        )  # fmt: skip


def _row_stride(columns: int, dtype: torch.dtype) -> int:
    """Elements from one row of a plane to the next: rows begin on 16-byte boundaries."""
    unit = ROW_ALIGNMENT // dtype.itemsize
    return triton.cdiv(columns, unit) * unit
