"""Launchers of products that share one input: several weights at once, and the gated pair.

Fewer launches and less traffic than one product after the other, with the same results: with
``invariant`` numerics the same bits.

Shapes: M rows of activations, K inputs, N outputs, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.activation.op import KINDS
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.op import check_operands
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows, options_of, plain
from oxillama_torch.kernels.registry import Call

__all__ = [
    "left_to_others",
    "quant_matmul_gated",
    "quant_matmul_segments",
    "types_of",
    "wants_quantized",
]


def quant_matmul_segments(
    x: torch.Tensor | QuantizedRows,
    weights: Sequence[PackedTensor],
    biases: Sequence[torch.Tensor | None],
    *,
    numerics: str = "invariant",
) -> list[torch.Tensor]:
    """``[x @ dequantize(w)^T + b for w, b in zip(weights, biases)]``, each accumulated in float32.

    Q4_K_M and its like mix types inside of one layer's q, k and v, which then cannot be one weight.

    Args:
        x: activations, float32, bfloat16 or float16 [M, K], with an 8-bit form or without.
        weights: packed, shapes (N_i, K).
        biases: [N_i] or None each.
        numerics: as for ``quant_matmul``.

    Returns:
        [M, N_i] each, in the dtype of ``x``.

    Raises:
        ValueError: a shape, dtype or device that does not fit; says got and wanted.
        UnsupportedError: no backend, or none that a rule allows, serves the call.
    """
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            f"biases: got {len(biases)}, wanted one for each of {len(weights)} weights"
        )
    rows = plain(x)
    for weight, bias in zip(weights, biases):
        check_operands(rows, weight, bias)
    if len(rows) == 0:
        return [rows.new_empty(0, weight.shape[0]) for weight in weights]
    kernel = registry.select("quant_matmul_segments", _call(rows, weights, numerics))
    options = options_of(kernel, x)
    return kernel.function(rows, weights, biases, numerics=numerics, **options)


def quant_matmul_gated(
    x: torch.Tensor | QuantizedRows,
    weight: PackedTensor,
    kind: str,
    *,
    numerics: str = "invariant",
) -> torch.Tensor:
    """``act(x @ gate^T) * (x @ up^T)`` (Shazeer 2020, arXiv:2002.05202).

    Both products are rounded to the dtype of ``x`` before the activation, as if they had been two.

    Args:
        x: activations, float32, bfloat16 or float16 [M, K], with an 8-bit form or without.
        weight: packed, shape (2 F, K): the rows of gate, then those of up.
        kind: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        numerics: as for ``quant_matmul``.

    Returns:
        [M, F] in the dtype of ``x``.

    Raises:
        ValueError, UnsupportedError: as for ``quant_matmul_segments``.
    """
    rows = plain(x)
    check_operands(rows, weight, None)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    if weight.shape[0] % 2:
        raise ValueError(f"weight: got {weight.shape[0]} rows, wanted an even number")
    if len(rows) == 0:
        return rows.new_empty(0, weight.shape[0] // 2)
    kernel = registry.select("quant_matmul_gated", _call(rows, [weight], numerics))
    return kernel.function(rows, weight, kind, numerics=numerics, **options_of(kernel, x))


def wants_quantized(
    x: torch.Tensor, weights: Sequence[PackedTensor], numerics: str, *, gated: bool = False
) -> bool:
    """Whether the product that ``x`` goes into would quantize it, and takes it quantized.

    Args:
        x: activations [M, K], or any tensor with as many rows of that dtype.
        weights: of ``quant_matmul``, or of ``quant_matmul_segments`` if several.
        gated: the product is ``quant_matmul_gated``.
    """
    if numerics != "fast" or len(x) == 0:
        return False
    several = "quant_matmul_segments" if len(weights) > 1 else "quant_matmul"
    op = "quant_matmul_gated" if gated else several
    return registry.select(op, _call(x, weights, numerics)).takes_quantized


def _call(x: torch.Tensor, weights: Sequence[PackedTensor], numerics: str) -> Call:
    """The type of several weights is ``"Q4_K+Q6_K"``; ``types_of`` takes it apart."""
    types = "+".join(weight.format.name for weight in weights)
    return Call(x.device.type, x.dtype, numerics, types, x.shape[0])


def types_of(call: Call) -> list[str]:
    """GGML types of a call's weights, in order."""
    return (call.type or "").split("+")


def left_to_others(*ops: str) -> Callable[[Call], str | None]:
    """``unless_asked`` of a fused backend: where a rule chooses the kernel of one of the ops that
    it stands for, that kernel is to be run."""

    def reason(call: Call) -> str | None:
        ruled = [rule.op for rule in registry.active_rules() if rule.op in ops]
        return f"a rule chooses the kernel of {ruled[0]}" if ruled else None

    return reason
