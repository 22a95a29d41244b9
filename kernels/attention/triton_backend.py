"""The Triton backends of attention: tile sizes, choice between one pass and split keys, launch.

``triton.invariant`` uses one tile shape and one segment length for every call of a model, so that
its two ways, and decoding and prefill, round alike. ``triton.fast`` chooses both by the call.

Shapes: T query tokens of B requests, Hq query heads, Hkv key/value heads, D key head dim, DV value
head dim, P pages of S slots, L pages per row of the page table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.attention.triton_decode import decode_kernel
from oxillama_torch.kernels.attention.triton_prefill import prefill_kernel
from oxillama_torch.kernels.attention.triton_reduce import reduce_kernel
from oxillama_torch.kernels.kv_formats import format_of, raw
from oxillama_torch.kernels.kv_tile import kv_kind
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    dot_dtype,
    launch_device,
    multiprocessors,
    pdl_options,
    priority,
)

__all__ = ["Tiling", "constants", "fast_tiling", "invariant_tiling", "launch"]

# Float32 workspace that split keys may take; beyond it programs are plenty anyway.
_WORKSPACE_BYTES = 64 << 20
# Tiles of larger heads do not fit into shared memory.
_MAX_DIM = 256
# Programs per multiprocessor below which keys are split.
_WAVES = 2


@dataclass(frozen=True)
class Tiling:
    """How a call is cut.

    Args:
        block_m: rows of a query tile.
        block_n: keys of a KV tile.
        segment: keys summed up by themselves, a multiple of ``block_n``.
        segmented: whether one pass keeps segments apart as well, and so rounds like split keys.
        num_warps, num_stages: launch options.
    """

    block_m: int
    block_n: int
    segment: int
    segmented: bool
    num_warps: int
    num_stages: int


def invariant_tiling(group: int, dtype: torch.dtype) -> Tiling:
    """Fixed by the model alone: heads per KV head and dtype of the dots.

    A segment's sums stand beside the sums so far, so tiles are smaller than the fast ones; and
    rows are few, as decoding fills only those of one token.
    """
    if dtype == torch.float32:
        return _float32_tiling(group, segmented=True)
    return Tiling(max(32, triton.next_power_of_2(group)), 32, 512, True, 8, 2)


def fast_tiling(
    group: int, dim: int, dtype: torch.dtype, max_query_len: int, large: bool
) -> Tiling:
    """By the longest chunk too: few rows for decoding, many for prefill.

    Args:
        large: whether the GPU's matrix units read operands from shared memory (sm_90, sm_100),
            which leaves registers for tiles of 128 rows.
    """
    if dtype == torch.float32:
        return _float32_tiling(group, segmented=False)
    block_n = 64 if dim <= 128 else 32
    rows, least = triton.next_power_of_2(group * max_query_len), triton.next_power_of_2(group)
    if rows <= 16:
        return Tiling(16, block_n, 256, False, 4, 3)
    if rows > 64 and (dim <= 64 or (dim <= 128 and large)):
        return Tiling(max(128, least), block_n, 512, False, 8, 2)
    return Tiling(max(64, least), block_n, 512, False, 4 if dim <= 64 and least <= 64 else 8, 2)


def _float32_tiling(group: int, segmented: bool) -> Tiling:
    """Without tensor cores a dot is unrolled into fmas: only small tiles stay in registers."""
    return Tiling(max(16, triton.next_power_of_2(group)), 16, 512, segmented, 4, 2)


@functools.cache
def _large_tiles(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def constants(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, tiling: Tiling
) -> dict:
    """The constexpr arguments that prefill and decode share."""
    (_, page_size, kv_heads, _), dim = k_pages.shape, q.shape[2]
    group, value_dim = q.shape[1] // kv_heads, _value_dim(q, k_pages, v_pages)
    return {
        "HKV": kv_heads,
        "GROUP": group,
        "D": dim,
        "DV": value_dim,
        "S": page_size,
        "TOKENS": tiling.block_m // group,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        "DOT_DTYPE": dot_dtype(_dot_torch_dtype(q, k_pages)),
        "KV": kv_kind(k_pages, dim),
    }


def _dot_torch_dtype(q: torch.Tensor, k_pages: torch.Tensor) -> torch.dtype:
    """Mixed dtypes meet in float32: bfloat16 lacks float16's precision, float16 its range.

    Bytes become what q is.
    """
    same = k_pages.dtype == q.dtype or k_pages.dtype.itemsize == 1
    return q.dtype if same else torch.float32


def _value_dim(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> int:
    return format_of(k_pages, q.shape[2]).dim(v_pages.shape[3])


def launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    tiling: Tiling,
    split: bool | None = None,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with one tiling; ``split`` divides keys among programs, None: where it pays.

    The other arguments are the op's.
    """
    tokens, heads, _ = q.shape
    consts = constants(q, k_pages, v_pages, tiling)
    tiles = (max_query_len + consts["TOKENS"] - 2) // consts["TOKENS"] + 1
    grid = (seq_lens.shape[0] * tiles, consts["HKV"])
    segments = triton.cdiv(max_seq_len, tiling.segment)
    if split is None:
        split = _split_pays(q, math.prod(grid), segments, consts["DV"])
    scalars = _scalars(scale, softcap, window)
    out = q.new_empty(tokens, heads, consts["DV"])
    inputs = (q, raw(k_pages), raw(v_pages), page_table, query_start, seq_lens)
    sizes = (page_table.shape[1], tiles, tiling.segment, *scalars)
    consts |= {"HAS_WINDOW": window is not None, "HAS_CAP": softcap is not None}
    consts |= {"HAS_SLOPES": slopes is not None}
    consts |= {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    dependent = pdl_options(q.device)
    sinks_or_any, slopes_or_any = (seq_lens if x is None else x for x in (sinks, slopes))
    with launch_device(q):
        if not split:
            prefill_kernel[grid](
                *inputs, sinks_or_any, slopes_or_any, out, *sizes,
                HAS_SINKS=sinks is not None, SEGMENTED=tiling.segmented, **consts, **dependent,
            )  # fmt: skip
            return out
        acc = q.new_empty(tokens, heads, segments, consts["DV"], dtype=torch.float32)
        top, total = acc.new_empty(2, tokens, heads, segments)
        decode_kernel[(*grid, segments)](
            *inputs, slopes_or_any, top, total, acc, *sizes, **consts, **dependent
        )
        reduce_kernel[(seq_lens.shape[0] * max_query_len, heads)](
            top, total, acc, query_start, seq_lens, sinks_or_any, out,
            max_query_len, segments, tiling.segment, scalars[0], scalars[-1],
            HQ=heads, DV=consts["DV"], HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None, BLOCK_DV=consts["BLOCK_DV"], num_warps=1, **dependent,
        )  # fmt: skip
    return out


def _scalars(
    scale: float, softcap: float | None, window: int | None
) -> tuple[float, float, float, int]:
    """factor, inner, cap and window, as the kernels take them."""
    log2e = math.log2(math.e)
    if softcap is None:
        return scale * log2e, 0.0, 0.0, window or 0
    return log2e, 2 * log2e * scale / softcap, softcap, window or 0


def _split_pays(q: torch.Tensor, programs: int, segments: int, value_dim: int) -> bool:
    """Whether one pass would leave much of the GPU idle, and the workspace is small."""
    workspace = q.shape[0] * q.shape[1] * segments * value_dim * 4
    idle = programs < _WAVES * multiprocessors(q.device)
    return segments > 1 and idle and workspace <= _WORKSPACE_BYTES


@register("attention", "triton.invariant", devices=DEVICES, priority=priority(1))
def invariant(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *batch: torch.Tensor, **kwargs
) -> torch.Tensor:
    """Fixed tiles and segments."""
    group, _, dtype = _model(q, k_pages, v_pages)
    tiling = invariant_tiling(group, dtype)
    return launch(q, k_pages, v_pages, *batch, tiling, **kwargs)


@register("attention", "triton.fast", devices=DEVICES, numerics=("fast",), priority=priority(2))
def fast(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *batch: torch.Tensor, **kwargs
) -> torch.Tensor:
    """Tiles and segments by the call."""
    model = _model(q, k_pages, v_pages)
    tiling = fast_tiling(*model, kwargs["max_query_len"], _large_tiles(q.device))
    return launch(q, k_pages, v_pages, *batch, tiling, **kwargs)


def _model(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
) -> tuple[int, int, torch.dtype]:
    """What a tiling depends on: heads per KV head, the larger head dim, dtype of the dots."""
    dim = max(q.shape[2], _value_dim(q, k_pages, v_pages))
    if dim > _MAX_DIM:
        supported = (f"head dims up to {_MAX_DIM}", "any head dim with attention=reference")
        raise UnsupportedError(f"Triton attention with a head dim of {dim}", supported)
    return q.shape[1] // k_pages.shape[2], dim, _dot_torch_dtype(q, k_pages)
