"""Tile sizes and launch options of the Triton matmuls: our own table, in place of autotuning.

Autotuning while serving stalls requests for minutes and makes bits depend on timing. Every choice
here is a pure function of the shape, so it is the same in every run.

Shapes: M rows, K inputs, N outputs; a program computes BLOCK_M x BLOCK_N results.
"""

from __future__ import annotations

from dataclasses import dataclass

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
_DP4A = Config(1, 8, 32, num_warps=1)  # block_k in units of 32 bytes
_INVARIANT = Config(16, 64, 128, num_warps=4)
# (largest M, config); the last serves every larger M.
_GEMM = (
    (16, Config(16, 64, 128, num_warps=4)),
    (32, Config(32, 64, 128, num_warps=4)),
    (64, Config(64, 64, 64, num_warps=4)),
    (None, Config(128, 128, 64, num_warps=8)),
)


def gemv_config() -> Config:
    """For at most GEMV_MAX_ROWS rows."""
    return _INTERPRETED if INTERPRET else _GEMV


def dp4a_config() -> Config:
    """For at most DP4A_MAX_ROWS rows."""
    return _INTERPRETED_DP4A if INTERPRET else _DP4A


def invariant_config() -> Config:
    """One config whatever M is, so that a row's additions come in one order."""
    return _INTERPRETED if INTERPRET else _INVARIANT


def gemm_config(rows: int) -> Config:
    """The fastest for this many rows."""
    if INTERPRET:
        return _INTERPRETED
    return next(config for most, config in _GEMM if most is None or rows <= most)


def block_k(format: Format, inputs: int, most: int) -> int:
    """K tile: a power of two up to ``most`` that divides K.

    Formats of single weights mask the end of a row, so any power of two from 16 will do.
    """
    if format.block_weights == 1:
        return max(16, min(most, 1 << (inputs - 1).bit_length()))
    return min(most, inputs & -inputs)
