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
from oxillama_torch.kernels.formats import pairs
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


@jit
def run_tile(q, p_scales, s_scales, rows, row_mask, side, run, d, dmin):
    """A run of 32 of each half: its quants, four to an int32 -> its weights, in words of two."""
    at = p_scales + rows[:, None] * s_scales + (side // 2 * 8 + run * 2 + side % 2)[None, :]
    scales = tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32)
    scale, least = small_to_float(scales & 15, 0), small_to_float(scales >> 4, 0)
    return pairs.scaled_less(pairs.exact(q & 0x03030303, 0), d * scale, dmin * least)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    side = pairs.sides(k0, BLOCK_K)
    d, dmin = pairs.load_halves(p2, s2, rows, row_mask, side // 4)
    q = pairs.load_fours(p0, s0, rows, row_mask, (side * 4)[:, None] + tl.arange(0, 4)[None, :])
    first = 0
    if BLOCK_K == 64:
        first = k0 // 64 % 2 * 2
        q = q >> 2 * first
    q0 = run_tile(q, p1, s1, rows, row_mask, side, first, d, dmin)
    q1 = run_tile(q >> 2, p1, s1, rows, row_mask, side, first + 1, d, dmin)
    if BLOCK_K == 64:
        return pairs.two_runs(q0, q1)
    else:
        q2 = run_tile(q >> 4, p1, s1, rows, row_mask, side, 2, d, dmin)
        q3 = run_tile(q >> 6, p1, s1, rows, row_mask, side, 3, d, dmin)
        return pairs.four_runs(q0, q1, q2, q3)


FORMAT = Format(
    GGMLType.Q2_K,
    {"qs": 64, "scales": 16, "dm": 2},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
