"""What F32, F16 and BF16 share: one weight is one block, and the plane is the matrix itself.

Shapes: see ``base.py``; the one plane ``w`` is [N, K] in the type's own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.tile import jit, tl

__all__ = ["plain_format"]


def _join(w: Tensor) -> Tensor:
    return w.contiguous().view(torch.uint8)


def _decode(out: Tensor, w: Tensor) -> None:
    out.copy_(w)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Plane: w. float32 [BLOCK_N, BLOCK_K]; 0 where a row is masked or k >= K."""
    k = k0 + tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (k < K)[None, :]
    return tl.load(p0 + rows[:, None] * s0 + k[None, :], mask=mask, other=0.0).to(tl.float32)


def plain_format(type: GGMLType, dtype: torch.dtype, decode_tile: Any = decode_tile) -> Format:
    """The format of unquantized weights of ``dtype``."""

    def split(blocks: Tensor) -> dict[str, Tensor]:
        return {"w": blocks.view(dtype)}

    return Format(type, {"w": 1}, split, _join, _decode, decode_tile)
