"""Tile sizes and launch options of the Triton matmuls: our own table, in place of autotuning.

Autotuning while serving stalls requests for minutes and makes bits depend on timing. Every choice
here is a pure function of the shape, so it is the same in every run.

Shapes: M rows, K inputs, N outputs; a program computes BLOCK_M x BLOCK_N results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.triton_support import INTERPRET

__all__ = [
    "DP4A_MAX_ROWS",
    "GEMV_MAX_ROWS",
    "Config",
    "block_k",
    "dp4a_config",
    "gemm_config",
    "gemv_config",
    "invariant_config",
]

# Each row of these kernels decodes the weights anew; beyond, the tensor cores' 16 rows cost less.
GEMV_MAX_ROWS = 2
DP4A_MAX_ROWS = 4


@dataclass(frozen=True, slots=True)
class Config:
    """One set of tile sizes and launch options; ``block_k`` is an upper bound."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 3


# Interpreted, time goes by programs and loop turns, not by work: few large tiles.
_INTERPRETED = Config(16, 256, 256, num_warps=4)
_INTERPRETED_DP4A = Config(1, 256, 8, num_warps=1)

# Chosen by counting instructions per weight, registers and shared memory on the cross-compiled
# kernels, not by timing them.
_GEMV = Config(1, 8, 256, num_warps=2)
# dp4a counts block_k in units of its formats. Q5_K and Q6_K need more registers.
_DP4A = Config(1, 8, 32, num_warps=1)
_DP4A_WIDE = Config(1, 4, 32, num_warps=1)
_INVARIANT = Config(16, 64, 128, num_warps=4)
# (largest M, config); the last serves every larger M.
_GEMM = (
    (16, _INVARIANT),
    (32, Config(32, 64, 128, num_warps=4)),
    (64, Config(64, 64, 64, num_warps=4)),
    (None, Config(128, 128, 64, num_warps=8)),
)


def gemv_config() -> Config:
    """For at most GEMV_MAX_ROWS rows."""
    return _INTERPRETED if INTERPRET else _GEMV


def dp4a_config(format: Format) -> Config:
    """For at most DP4A_MAX_ROWS rows."""
    if INTERPRET:
        return _INTERPRETED_DP4A
    return _DP4A_WIDE if format.name in ("Q5_K", "Q6_K") else _DP4A


def invariant_config() -> Config:
    """One config whatever M is, so that a row's additions come in one order."""
    return _INTERPRETED if INTERPRET else _INVARIANT


def gemm_config(rows: int, dtype: torch.dtype) -> Config:
    """The fastest for this many rows.

    Args:
        rows: M.
        dtype: of the activations. float32 runs on the ordinary cores, whose sums for the largest
            tiles do not fit in registers.
    """
    if INTERPRET:
        return _INTERPRETED
    configs = _GEMM[:-1] if dtype == torch.float32 else _GEMM
    return next((c for most, c in configs if most is None or rows <= most), configs[-1][1])


def block_k(format: Format, inputs: int, most: int) -> int:
    """K tile: a power of two up to ``most`` that divides K.

    Formats of single weights mask the end of a row, so any power of two from 16 will do.
    """
    if format.block_weights == 1:
        return max(16, min(most, 1 << (inputs - 1).bit_length()))
    return min(most, inputs & -inputs)
