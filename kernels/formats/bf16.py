"""BF16: one weight per block, the upper 16 bits of a float32, little-endian.

Shapes: see ``base.py``; the one plane ``w`` is bfloat16 [N, K].
"""

from __future__ import annotations

import torch

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.plain import plain_format
from oxillama_torch.kernels.formats.tile import jit, tl


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Plane: w. float32 [BLOCK_N, BLOCK_K]; 0 where a row is masked or k >= K."""
    k = k0 + tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (k < K)[None, :]
    w = tl.load(p0 + rows[:, None] * s0 + k[None, :], mask=mask, other=0.0)
    # By hand, because Triton's interpreter gets the value of subnormal bfloat16 wrong.
    return (w.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


FORMAT = plain_format(GGMLType.BF16, torch.bfloat16, decode_tile)
