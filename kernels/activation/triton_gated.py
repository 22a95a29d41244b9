"""Gated activation, one program per tile of a row.

Shapes: M rows, F features. gate, up [M, F] with row strides, out [M, F].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    Variant,
    launch_device,
    pdl_begin,
    pdl_options,
    priority,
)

__all__ = ["activate", "gated", "gated_kernel", "variants"]

_BLOCK = 1024


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), without an overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """One of ``op.KINDS`` of float32 values."""
    if KIND == "silu":
        x *= _sigmoid(x)
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        x *= _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def gated_kernel(
    gate, up, out, gate_stride, up_stride, F,
    KIND: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, tile of features)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    pdl_begin(USE_PDL)
    x = tl.load(gate + row * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, (activate(x, KIND) * y).to(out.dtype.element_ty), mask=inside)


@register("gated", "triton", devices=DEVICES, priority=priority(1))
def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Triton backend of :func:`oxillama_torch.kernels.activation.op.gated`."""
    rows, features = gate.shape
    out = gate.new_empty(rows, features)
    with launch_device(gate):
        gated_kernel[(rows, triton.cdiv(features, _BLOCK))](
            gate, up, out, gate.stride(0), up.stride(0), features,
            KIND=kind, BLOCK=_BLOCK, **pdl_options(gate.device),
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """The compiled forms, for counting without a GPU what they take."""
    return [
        Variant(
            f"gated-{kind}",
            gated_kernel,
            {**dict.fromkeys(("gate", "up", "out"), "*bf16")}
            | dict.fromkeys(("gate_stride", "up_stride", "F"), "i32"),
            {"KIND": kind, "BLOCK": _BLOCK},
            ("gate", "up", "out", "gate_stride", "up_stride", "F"),
        )
        for kind in ("silu", "gelu", "gelu_tanh")
    ]
