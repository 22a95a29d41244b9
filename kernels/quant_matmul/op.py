"""Launchers of the matrix products with packed weights: checks, choice of backend, call.

Shapes: M rows of activations, K inputs, N outputs, E experts.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows, options_of, plain

__all__ = ["check_operands", "quant_matmul", "quant_matmul_experts"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quant_matmul(
    x: torch.Tensor | QuantizedRows,
    weight: PackedTensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    numerics: str = "invariant",
) -> torch.Tensor:
    """``y = x @ dequantize(weight)^T + bias + residual``, accumulated in float32.

    Bias, then residual are added to the float32 sum; the result is rounded once, to the dtype of
    ``x``. With a residual the op is ``quant_matmul_residual``, whose kernels are chosen by
    themselves.

    Args:
        x: activations, float32, bfloat16 or float16 [M, K], with an 8-bit form or without.
        weight: packed weight of shape (N, K).
        bias: [N], any floating dtype; added in float32.
        residual: [M, N], any floating dtype; it is left as it is.
        numerics: ``"invariant"`` (a row's bits depend on nothing else in the batch) or ``"fast"``.

    Returns:
        [M, N] in the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device that does not fit; says got and wanted.
        UnsupportedError: no backend, or none that a rule allows, serves the call.
    """
    rows = plain(x)
    check_operands(rows, weight, bias)
    if residual is not None:
        _check_residual(residual, rows, weight)
    if len(rows) == 0:
        return rows.new_empty(0, weight.shape[0])
    if residual is None:
        kernel = registry.select("quant_matmul", _call(rows, weight, numerics))
        return kernel.function(rows, weight, bias, **options_of(kernel, x))
    kernel = registry.select("quant_matmul_residual", _call(rows, weight, numerics))
    options = options_of(kernel, x)
    return kernel.function(rows, weight, bias, residual, numerics=numerics, **options)


def quant_matmul_experts(
    x: torch.Tensor,
    weight: PackedTensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    *,
    numerics: str = "invariant",
) -> torch.Tensor:
    """``y[i] = dequantize(weight of expert expert_ids[i]) @ x[i]``, accumulated in float32.

    Args:
        x: activations, float32, bfloat16 or float16 [M, K]; a token that goes to several experts
            stands in several rows.
        weight: the experts' packed weights one below the other, shape (E * N, K).
        expert_ids: int64 [M], each in ``0 .. num_experts - 1``.
        num_experts: E.
        numerics: as for :func:`quant_matmul`.

    Returns:
        [M, N] in the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device that does not fit; says got and wanted.
        UnsupportedError: no backend, or none that a rule allows, serves the call.
    """
    rows = check_operands(x, weight)
    if num_experts < 1 or weight.shape[0] % num_experts:
        raise ValueError(
            f"weight: got {weight.shape[0]} rows, wanted a multiple of num_experts = {num_experts}"
        )
    if expert_ids.shape != (rows,) or expert_ids.dtype != torch.int64:
        got = f"{expert_ids.dtype} {tuple(expert_ids.shape)}"
        raise ValueError(f"expert_ids: got {got}, wanted torch.int64 ({rows},)")
    if expert_ids.device != x.device:
        raise ValueError(f"expert_ids: got device {expert_ids.device}, wanted {x.device}")
    if rows == 0:
        return x.new_empty(0, weight.shape[0] // num_experts)
    kernel = registry.select("quant_matmul_experts", _call(x, weight, numerics))
    return kernel.function(x, weight, expert_ids, num_experts)


def check_operands(x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None) -> int:
    """Check the operands that all products share.

    Returns: the number of rows.

    Raises:
        ValueError: a shape, dtype or device that does not fit; says got and wanted.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (M, {weight.shape[1]})")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: got {x.dtype}, wanted one of {', '.join(map(str, _DTYPES))}")
    for name, plane in weight.planes.items():
        if plane.device != x.device:
            raise ValueError(
                f"weight plane {name!r}: got device {plane.device}, wanted {x.device} like x"
            )
    if bias is not None:
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, wanted ({weight.shape[0]},)")
        if not bias.is_floating_point() or bias.device != x.device:
            got = f"{bias.dtype} on {bias.device}"
            raise ValueError(f"bias: got {got}, wanted a floating dtype on {x.device}")
    return x.shape[0]


def _check_residual(residual: torch.Tensor, x: torch.Tensor, weight: PackedTensor) -> None:
    wanted = (x.shape[0], weight.shape[0])
    if residual.shape != wanted:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, wanted {wanted}")
    if not residual.is_floating_point() or residual.device != x.device:
        got = f"{residual.dtype} on {residual.device}"
        raise ValueError(f"residual: got {got}, wanted a floating dtype on {x.device}")


def _call(x: torch.Tensor, weight: PackedTensor, numerics: str) -> registry.Call:
    return registry.Call(
        device=x.device.type,
        dtype=x.dtype,
        numerics=numerics,
        type=weight.format.name,
        m=x.shape[0],
    )


_HERE = "oxillama_torch.kernels.quant_matmul"
registry.declare(
    "quant_matmul",
    f"{_HERE}.reference",
    f"{_HERE}.compiled",
    f"{_HERE}.cpu",
    f"{_HERE}.factored",
    f"{_HERE}.dense",
    f"{_HERE}.triton_dp4a",
    f"{_HERE}.triton_gemv",
    f"{_HERE}.triton_gemm",
)
registry.declare("quant_matmul_experts", f"{_HERE}.reference", f"{_HERE}.triton_experts")
registry.declare("quant_matmul_gated", f"{_HERE}.separate", f"{_HERE}.triton_gated_matmul")
registry.declare("quant_matmul_residual", f"{_HERE}.separate", f"{_HERE}.triton_residual")
registry.declare("quant_matmul_segments", f"{_HERE}.separate", f"{_HERE}.triton_segments")
