"""Q2_K: 256 weights in 84 bytes, 2.63 bits each, in 16 groups of 16: ``w = (d*sc) * q - dmin*m``.

Layout (``block_q2_K`` in ggml-common.h):
    byte 0    scales   uint8 [16]: sc in the low nibble, m in the high one
    byte 16   qs       uint8 [2, 32]: weight 128 h + 32 i + j in bits 2 i, 2 i + 1 of byte (h, j)
    byte 80   d, dmin  float16 [2]

Shapes: see ``base.py``. Planes per block: qs uint8 [64], scales uint8 [16], dm float16 [2].
"""

from __future__ import annotations

from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import crumbs, float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import crumbs_tile, jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 16:80],
        "scales": blocks[..., :16],
        "dm": float16_at(blocks, 80, 2),
    }


def join(qs: Tensor, scales: Tensor, dm: Tensor) -> Tensor:
    return join_bytes(scales, qs, dm)


def decode(out: Tensor, qs: Tensor, scales: Tensor, dm: Tensor) -> None:
    lead = qs.shape[:-1]
    out.view(*lead, 2, 4, 32).copy_(crumbs(qs.view(*lead, 2, 32)))
    dm = dm.float()
    d, m = dm[..., :1] * (scales & 15), dm[..., 1:] * (scales >> 4)
    out.view(*lead, 16, 16).mul_(d.unsqueeze(-1)).sub_(m.unsqueeze(-1))


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, scales, dm."""
    q = crumbs_tile(p0, s0, rows, row_mask, k0, BLOCK_N, BLOCK_K)
    q = small_to_float(q, 0).reshape(BLOCK_N, BLOCK_K // 16, 16)
    group = k0 // 16 + tl.arange(0, BLOCK_K // 16)
    mask = row_mask[:, None]
    scales = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0).to(tl.int32)
    dm_at = p2 + rows[:, None] * s2 + (group // 16 * 2)[None, :]
    d = tl.load(dm_at, mask=mask, other=0.0).to(tl.float32) * small_to_float(scales & 15, 0)
    m = tl.load(dm_at + 1, mask=mask, other=0.0).to(tl.float32) * small_to_float(scales >> 4, 0)
    w = q * d[:, :, None] - m[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(GGMLType.Q2_K, {"qs": 64, "scales": 16, "dm": 2}, split, join, decode, decode_tile)
