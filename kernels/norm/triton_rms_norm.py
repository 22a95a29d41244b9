"""RMSNorm with an optional residual sum in one pass, one program per row.

A row is held whole in registers, so its sum of squares is one tree that depends on D alone. It can
be quantized to 8 bits on the way: an integer product that follows needs no kernel for that.

Shapes: M rows, D features, G groups of 32. x, residual, y, summed [M, D], weight [D],
values [M, D], scales, sums [M, G].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.quant_matmul.triton_quantize import (
    GROUP,
    empty_integers,
    store_quantized,
)
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    Variant,
    launch_device,
    pdl_begin,
    pdl_options,
    priority,
)

__all__ = ["rms_norm", "rms_norm_kernel", "rms_norm_quantized", "variants"]


@triton.jit
def rms_norm_kernel(
    x, weight, residual, y, summed, values, scales, sums, D, eps,
    HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (row)."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    at = tl.program_id(0).to(tl.int64) * D + d
    pdl_begin(USE_PDL)
    h = tl.load(x + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        # Rounded to the dtype of x before the norm, as the next layer will read it.
        other = tl.load(residual + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(summed + at, h, mask=inside)
    h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, axis=0) / D + eps)
    w = tl.load(weight + d, mask=inside, other=0.0)
    normed = (h * scale * w).to(y.dtype.element_ty)
    tl.store(y + at, normed, mask=inside)
    if QUANTIZE:
        v = normed.to(tl.float32).reshape(BLOCK_D // GROUP, GROUP)
        group = tl.arange(0, BLOCK_D // GROUP)
        k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        m = tl.program_id(0).to(tl.int64)
        store_quantized(v, k, group, m, values, scales, sums, D, GROUP)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


@register("rms_norm", "triton", devices=DEVICES, priority=priority(1))
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Triton backend of :func:`oxillama_torch.kernels.norm.op.rms_norm`."""
    y, summed = _launch(x, weight, eps, residual, None)
    return y if residual is None else (y, summed)


@register("rms_norm_quantized", "triton", devices=DEVICES, priority=priority(1))
def rms_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Triton backend of :func:`oxillama_torch.kernels.norm.op.rms_norm_quantized`."""
    integers = empty_integers(x)
    y, summed = _launch(x, weight, eps, residual, integers)
    return y, *integers, summed


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    integers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed rows and the sum; ``integers`` (values, scales, sums) is written where given."""
    rows, features = x.shape
    y = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(features)
    with launch_device(x):
        rms_norm_kernel[(rows,)](
            x, weight, x if residual is None else residual, y, summed,
            *(integers or (y, y, y)), features, eps,
            HAS_RESIDUAL=residual is not None, QUANTIZE=integers is not None, GROUP=GROUP,
            BLOCK_D=block, num_warps=_num_warps(block),
            **pdl_options(x.device),
        )  # fmt: skip
    return y, summed


def variants() -> list[Variant]:
    """The compiled forms, for counting without a GPU what they take."""
    tensors = {**dict.fromkeys(("x", "residual", "y", "summed"), "*bf16"), "values": "*i8"}
    tensors |= dict.fromkeys(("weight", "scales", "sums"), "*fp32")
    kinds = {"": (False, False), "-residual": (True, False), "-residual-quantized": (True, True)}
    return [
        Variant(
            f"rms-norm-{features}{name}",
            rms_norm_kernel,
            tensors | {"D": "i32", "eps": "fp32"},
            {"HAS_RESIDUAL": has_residual, "QUANTIZE": quantize, "GROUP": GROUP}
            | {"BLOCK_D": triton.next_power_of_2(features)},
            (*tensors, "D"),
            _num_warps(triton.next_power_of_2(features)),
        )
        for features in (128, 4096, 5120, 16384)
        for name, (has_residual, quantize) in kinds.items()
    ]
