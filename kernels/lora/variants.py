"""The compiled forms of the adapter kernels, for counting without a GPU what they take."""

from __future__ import annotations

import triton.language as tl

from oxillama_torch.kernels.lora import triton_backend
from oxillama_torch.kernels.lora.op import MAX_PARTS, RANK_TILE, ROW_TILE
from oxillama_torch.kernels.lora.triton_expand import expand_kernel
from oxillama_torch.kernels.lora.triton_shrink import shrink_kernel
from oxillama_torch.kernels.triton_support import Variant

__all__ = ["variants"]

_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def variants() -> list[Variant]:
    """Both kernels for one layer and for three that share an input, in every dtype."""
    return [make(name, parts) for make in (_shrink, _expand) for name in _TYPES for parts in (1, 3)]


def _constants(name: str, parts: int) -> dict:
    assert parts <= MAX_PARTS, "more layers than the kernels take"
    return {
        "PARTS": parts,
        "FACTOR_DTYPE": _TYPES[name],
        "DOT_DTYPE": _TYPES[name],
        "BLOCK_M": ROW_TILE,
        "BLOCK_R": RANK_TILE,
    }


def _shrink(name: str, parts: int) -> Variant:
    arguments = {"x": f"*{name}", "rows": "*i64", "tiles": "*i64", "h": "*fp32"}
    arguments |= dict.fromkeys(("x_stride", "first", "P", "K", "R", "a_stride"), "i32")
    constants = {"SPLIT": triton_backend.SPLIT, "BLOCK_K": triton_backend.BLOCK_K}
    return Variant(
        f"shrink-{name}-{parts}",
        shrink_kernel,
        arguments,
        {**_constants(name, parts), **constants},
        ("x", "rows", "tiles", "h", "x_stride", "K", "R", "a_stride"),
    )


def _expand(name: str, parts: int) -> Variant:
    arguments = {"h": "*fp32", "rows": "*i64", "scales": "*fp32", "tiles": "*i64", "y": f"*{name}"}
    numbers = ("first", "y_stride", "P", "R", "splits", "N0", "N1", "N2")
    arguments |= dict.fromkeys(numbers, "i32")
    return Variant(
        f"expand-{name}-{parts}",
        expand_kernel,
        arguments,
        {**_constants(name, parts), "BLOCK_N": triton_backend.BLOCK_N},
        ("h", "rows", "scales", "tiles", "y", "y_stride", "R", "N0", "N1", "N2"),
    )
