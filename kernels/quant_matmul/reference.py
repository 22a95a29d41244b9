"""Matrix products with packed weights in plain torch: the truth, on any device.

Invariant by construction. Rows of x are padded to tiles of ROW_TILE, and a weight is cut into
chunks whose size depends on its own shape alone, so every matrix product that runs has the same
shape whatever M is. A BLAS chooses its blocking, hence its order of additions, by shape; with the
shape fixed, a row's bits depend on nothing but that row. Chunks are multiples of OUTPUT_TILE rows:
with other counts, MKL's result was seen to depend on the number of threads.

Shapes: M rows, K inputs, N outputs, E experts.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import register

__all__ = ["OUTPUT_TILE", "ROW_TILE", "quant_matmul", "quant_matmul_experts"]

ROW_TILE = 16
OUTPUT_TILE = 64
# Weights dequantized at a time: 4 MiB of float32, still in the cache when they are used.
_CHUNK_WEIGHTS = 1 << 20


@register("quant_matmul", "reference")
def quant_matmul(
    x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Reference of :func:`oxillama_torch.kernels.quant_matmul.op.quant_matmul`."""
    out = _matmul(x, weight)
    return (out if bias is None else out + bias.float()).to(x.dtype)


@register("quant_matmul_experts", "reference")
def quant_matmul_experts(
    x: torch.Tensor, weight: PackedTensor, expert_ids: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Reference of :func:`oxillama_torch.kernels.quant_matmul.op.quant_matmul_experts`."""
    outputs = weight.shape[0] // num_experts
    out = x.new_empty(x.shape[0], outputs)
    for expert in expert_ids.unique().tolist():
        if not 0 <= expert < num_experts:
            raise ValueError(f"expert_ids: got {expert}, wanted 0 to {num_experts - 1}")
        chosen = (expert_ids == expert).nonzero().squeeze(1)
        packed = weight.rows(expert * outputs, (expert + 1) * outputs)
        out[chosen] = _matmul(x[chosen], packed).to(x.dtype)
    return out


def _matmul(x: torch.Tensor, weight: PackedTensor) -> torch.Tensor:
    """``x @ dequantize(weight)^T`` in float32, [M, N]."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    padded = x.new_zeros(_round_up(rows, ROW_TILE), inputs, dtype=torch.float32)
    padded[:rows] = x
    out = x.new_empty(len(padded), outputs, dtype=torch.float32)
    chunk = max(1, _CHUNK_WEIGHTS // (inputs * OUTPUT_TILE)) * OUTPUT_TILE
    chunk = min(chunk, _round_up(outputs, OUTPUT_TILE))
    workspace = x.new_zeros(chunk, inputs, dtype=torch.float32)
    for start in range(0, outputs, chunk):
        count = min(chunk, outputs - start)
        weight.rows(start, start + count).dequantize(workspace[:count])
        dequantized = workspace[: _round_up(count, OUTPUT_TILE)]
        for top in range(0, len(padded), ROW_TILE):
            product = torch.nn.functional.linear(padded[top : top + ROW_TILE], dequantized)
            out[top : top + ROW_TILE, start : start + count] = product[:, :count]
    return out[:rows]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
