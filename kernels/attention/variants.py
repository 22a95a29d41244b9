"""The compiled forms of the attention kernels, for counting without a GPU what they take."""

from __future__ import annotations

from dataclasses import replace

import torch

from oxillama_torch.kernels import kv_formats
from oxillama_torch.kernels.attention.triton_backend import (
    Tiling,
    constants,
    fast_tiling,
    invariant_tiling,
)
from oxillama_torch.kernels.attention.triton_decode import decode_kernel
from oxillama_torch.kernels.attention.triton_prefill import prefill_kernel
from oxillama_torch.kernels.attention.triton_reduce import reduce_kernel
from oxillama_torch.kernels.triton_support import Variant

__all__ = ["variants"]

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_SCALARS = {
    "width": "i32",
    "tiles": "i32",
    "segment": "i32",
    "factor": "fp32",
    "inner": "fp32",
    "cap": "fp32",
    "window": "i32",
}


def variants() -> list[Variant]:
    """Prefill, decode and reduce in the tilings that they run with."""
    return [
        *_of_model("g4-d128", 4, 128, torch.bfloat16),
        *_of_model("g1-d64", 1, 64, torch.float16),
        *_of_model("g7-d80", 7, 80, torch.bfloat16),
        *_of_model("g2-d256", 2, 256, torch.bfloat16),
        *_of_model("g4-d128-f32", 4, 128, torch.float32),
        *_of_model("g1-d128-slopes", 1, 128, torch.bfloat16, slopes=True),
        *_of_model("g4-d128-flags", 4, 128, torch.bfloat16, window=True, cap=True, sinks=True),
        *_of_model("g4-d128-fp8", 4, 128, torch.bfloat16, kv="fp8"),
        *_of_model("g4-d128-q8_0", 4, 128, torch.bfloat16, kv="q8_0"),
        *_of_model("g4-d128-q4_0", 4, 128, torch.bfloat16, kv="q4_0"),
    ]


def _of_model(
    name: str, group: int, dim: int, dtype: torch.dtype, **flags: bool | str
) -> list[Variant]:
    model = (group, dim, dtype)
    invariant = invariant_tiling(group, dtype)
    decoding, short, long, large = (
        fast_tiling(*model, length, large)
        for length, large in ((1, False), (64 // group, False), (512, False), (512, True))
    )
    found = [
        _prefill(f"prefill-invariant-{name}", *model, invariant, **flags),
        _decode(f"decode-invariant-{name}", *model, invariant, **flags),
        _prefill(f"prefill-fast-{name}", *model, long, **flags),
        _prefill(f"decode-fast-whole-{name}", *model, decoding, **flags),
        _decode(f"decode-fast-split-{name}", *model, decoding, **flags),
        _reduce(f"reduce-{name}", *model, **flags),
    ]
    if short not in (long, decoding):
        found.append(_prefill(f"prefill-fast-short-{name}", *model, short, **flags))
    if large != long:  # for sm_90 and sm_100 alone
        found.append(_prefill(f"prefill-fast-large-{name}", *model, large, **flags))
    return found


def _constants(group: int, dim: int, dtype: torch.dtype, tiling: Tiling, kv: str = "auto") -> dict:
    q = torch.empty(1, 8 * group, dim, dtype=dtype, device="meta")
    format = kv_formats.find(kv, dtype)
    pages = torch.empty(1, 32, 8, format.row(dim), dtype=format.dtype, device="meta")
    return constants(q, pages, pages, tiling)


def _prefill(
    name: str, group: int, dim: int, dtype: torch.dtype, tiling: Tiling,
    window: bool = False, cap: bool = False, sinks: bool = False, slopes: bool = False,
    kv: str = "auto",
) -> Variant:  # fmt: skip
    tensors = dict.fromkeys(("q", "k_pages", "v_pages", "out"), _POINTERS[dtype])
    if kv != "auto":
        tensors |= dict.fromkeys(("k_pages", "v_pages"), "*u8")
    tensors |= dict.fromkeys(("page_table", "query_start", "seq_lens"), "*i32")
    tensors |= dict.fromkeys(("sinks", "slopes"), "*fp32")
    return Variant(
        name,
        prefill_kernel,
        tensors | _SCALARS,
        _constants(group, dim, dtype, tiling, kv)
        | {"HAS_WINDOW": window, "HAS_CAP": cap, "HAS_SINKS": sinks, "HAS_SLOPES": slopes}
        | {"SEGMENTED": tiling.segmented},
        (*tensors, "segment"),
        tiling.num_warps,
        tiling.num_stages,
    )


def _decode(
    name: str, group: int, dim: int, dtype: torch.dtype, tiling: Tiling,
    window: bool = False, cap: bool = False, sinks: bool = False, slopes: bool = False,
    kv: str = "auto",
) -> Variant:  # fmt: skip
    whole = _prefill(name, group, dim, dtype, tiling, window, cap, sinks, slopes, kv)
    tensors = {n: t for n, t in whole.arguments.items() if n not in ("out", "sinks")}
    parts = dict.fromkeys(("part_top", "part_total", "part_acc"), "*fp32")
    constants = {n: c for n, c in whole.constants.items() if n not in ("HAS_SINKS", "SEGMENTED")}
    aligned = (*(n for n in whole.aligned if n in tensors), *parts)
    return replace(
        whole,
        kernel=decode_kernel,
        arguments=tensors | parts,
        constants=constants,
        aligned=aligned,
    )


def _reduce(
    name: str, group: int, dim: int, dtype: torch.dtype,
    window: bool = False, cap: bool = False, sinks: bool = False, slopes: bool = False,
    kv: str = "auto",
) -> Variant:  # fmt: skip
    del cap, slopes, kv  # in the scores already
    tensors = dict.fromkeys(("part_top", "part_total", "part_acc", "sinks"), "*fp32")
    tensors |= {"query_start": "*i32", "seq_lens": "*i32", "out": _POINTERS[dtype]}
    scalars = dict.fromkeys(("max_query_len", "segments", "segment", "window"), "i32")
    consts = _constants(group, dim, dtype, fast_tiling(group, dim, dtype, 1, False))
    return Variant(
        name,
        reduce_kernel,
        tensors | scalars | {"factor": "fp32"},
        {"HQ": 8 * group, "HAS_WINDOW": window, "HAS_SINKS": sinks}
        | {n: consts[n] for n in ("DV", "BLOCK_DV")},
        (*tensors, "segment"),
        num_warps=1,
    )
