"""Tile sizes and launch options of the Triton matmuls: our own tables, in place of autotuning.

Autotuning while serving stalls requests for minutes and makes bits depend on timing. Every choice
here is a pure function of weight, rows and GPU: the entry of a tuned table (``tuned``), else the
default below.

Shapes: M rows, K inputs, N outputs; a program computes BLOCK_M x BLOCK_N results.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from oxillama_torch.kernels.formats.base import Format, PackedTensor
from oxillama_torch.kernels.quant_matmul import tuned
from oxillama_torch.kernels.triton_support import INTERPRET

__all__ = [
    "DP4A_MAX_ROWS",
    "GEMV_MAX_ROWS",
    "Config",
    "block_k",
    "candidates",
    "default",
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
# dp4a counts block_k in units of its formats. Some need more registers.
_DP4A = Config(1, 8, 32, num_warps=1)
_DP4A_WIDE = Config(1, 4, 32, num_warps=1)
_NEED_REGISTERS = ("Q2_K", "Q3_K", "Q5_K", "Q6_K")
_INVARIANT = Config(16, 64, 128, num_warps=4)
# (largest M, config); the last serves every larger M.
_GEMM = (
    (16, _INVARIANT),
    (32, Config(32, 64, 128, num_warps=4)),
    (64, Config(64, 64, 64, num_warps=4)),
    (None, Config(128, 128, 64, num_warps=8)),
)


def gemv_config(weight: PackedTensor, rows: int) -> Config:
    """For at most GEMV_MAX_ROWS rows."""
    return _tuned("gemv", weight, rows) or default("gemv", weight.format, rows)


def dp4a_config(weight: PackedTensor, rows: int) -> Config:
    """For at most DP4A_MAX_ROWS rows."""
    return _tuned("dp4a", weight, rows) or default("dp4a", weight.format, rows)


def invariant_config(weight: PackedTensor) -> Config:
    """One config whatever M is, so that a row's additions come in one order."""
    return _tuned("invariant", weight, 1) or default("invariant", weight.format, 1)


def gemm_config(weight: PackedTensor, rows: int, dtype: torch.dtype) -> Config:
    """The fastest known for this many rows.

    Args:
        weight: packed weight.
        rows: M.
        dtype: of the activations.
    """
    found = _tuned("gemm", weight, rows) if dtype != torch.float32 else None
    return found or default("gemm", weight.format, rows, dtype)


def _tuned(kernel: str, weight: PackedTensor, rows: int) -> Config | None:
    found = tuned.lookup(kernel, weight.device, weight.type_name, rows, *weight.shape)
    return Config(*found) if found is not None else None


def default(kernel: str, format: Format, rows: int, dtype: torch.dtype = torch.bfloat16) -> Config:
    """The config of a kernel of ``tuned.KERNELS`` where no table has one.

    float32 activations run on the ordinary cores, whose sums for the largest tiles do not fit in
    registers.
    """
    if INTERPRET:
        return _INTERPRETED_DP4A if kernel == "dp4a" else _INTERPRETED
    if kernel == "dp4a":
        return _DP4A_WIDE if format.name in _NEED_REGISTERS else _DP4A
    if kernel == "gemm":
        configs = _GEMM[:-1] if dtype == torch.float32 else _GEMM
        found = (config for most, config in configs if most is None or rows <= most)
        return next(found, configs[-1][1])
    return _GEMV if kernel == "gemv" else _INVARIANT


def candidates(kernel: str, format: Format, rows: int) -> list[Config]:
    """Configs worth timing, the default first."""
    first = default(kernel, format, rows)
    if kernel == "dp4a":
        found = itertools.product((1,), (2, 4, 8, 16), (16, 32, 64), (1, 2, 4), (2, 3))
    elif kernel == "gemv":
        found = itertools.product((1,), (4, 8, 16), (128, 256, 512), (1, 2, 4), (2, 3))
    else:
        most = 16 if kernel == "invariant" else max(16, min(128, 1 << (rows - 1).bit_length()))
        sides = sorted({16, most // 2, most} - {8})
        found = itertools.product(sides, (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    return [first, *(c for c in itertools.starmap(Config, found) if c != first)]


def block_k(format: Format, inputs: int, most: int) -> int:
    """K tile: a power of two up to ``most`` that divides K.

    Formats of single weights mask the end of a row, so any power of two from 16 will do.
    """
    if format.block_weights == 1:
        return max(16, min(most, 1 << (inputs - 1).bit_length()))
    return min(most, inputs & -inputs)
