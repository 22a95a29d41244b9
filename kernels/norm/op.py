"""Launchers of RMSNorm and LayerNorm, with an optional residual sum.

Shapes: M rows, D features; G groups of 32 features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows

__all__ = ["layer_norm", "rms_norm", "rms_norm_quantized"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_FEATURES = 16384

registry.declare(
    "rms_norm",
    "oxillama_torch.kernels.norm.reference",
    "oxillama_torch.kernels.norm.compiled",
    "oxillama_torch.kernels.norm.triton_rms_norm",
)
registry.declare(
    "rms_norm_quantized",
    "oxillama_torch.kernels.norm.reference",
    "oxillama_torch.kernels.norm.triton_rms_norm",
)
registry.declare(
    "layer_norm",
    "oxillama_torch.kernels.norm.reference",
    "oxillama_torch.kernels.norm.triton_layer_norm",
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    numerics: str = "invariant",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``h * rsqrt(mean(h^2) + eps) * weight`` with ``h = x`` or ``h = x + residual``.

    Args:
        x: float32, bfloat16 or float16 [M, D], D at most 16384.
        weight: float32 [D].
        eps: added to the mean of squares.
        residual: like ``x``; when given, the sum is formed in ``x``'s dtype and returned too.
        numerics: ``"invariant"`` or ``"fast"``.

    Returns:
        The normed rows in ``x``'s dtype; with a residual, the pair (normed rows, sum).

    Raises:
        ValueError: an operand does not fit; says got and wanted.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    _check_rows(x, residual)
    _check_like("weight", weight, x.shape[1:], torch.float32, x.device)
    if x.numel() == 0:
        return x if residual is None else (x, residual)
    call = registry.Call(x.device.type, x.dtype, numerics, m=x.shape[0])
    return registry.select("rms_norm", call).function(x, weight, eps, residual=residual)


def rms_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    numerics: str = "fast",
) -> tuple[QuantizedRows, torch.Tensor]:
    """``rms_norm``, and its result in 8 bits too, for an integer product that comes next.

    Args:
        x, weight, eps, residual, numerics: as for :func:`rms_norm`; D a multiple of 32.

    Returns:
        The normed rows, quantized as ``triton_quantize.quantize`` would; the sum, or ``x`` where
        there is no residual.

    Raises:
        ValueError: an operand does not fit; says got and wanted.
    """
    _check_rows(x, residual)
    _check_like("weight", weight, x.shape[1:], torch.float32, x.device)
    if x.shape[1] % 32:
        raise ValueError(f"x: got {x.shape[1]} features, wanted a multiple of 32")
    if x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least one row")
    call = registry.Call(x.device.type, x.dtype, numerics, m=x.shape[0])
    kernel = registry.select("rms_norm_quantized", call)
    normed, values, scales, sums, summed = kernel.function(x, weight, eps, residual=residual)
    return QuantizedRows(normed, values, scales, sums), summed


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    numerics: str = "invariant",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``(h - mean(h)) * rsqrt(var(h) + eps) * weight + bias`` with ``h = x`` or ``x + residual``.

    The variance is the mean of the squared differences, taken after the mean: no cancellation.

    Args:
        x: float32, bfloat16 or float16 [M, D], D at most 16384.
        weight: float32 [D].
        bias: float32 [D] or None.
        eps: added to the variance.
        residual: like ``x``; when given, the sum is formed in ``x``'s dtype and returned too.
        numerics: ``"invariant"`` or ``"fast"``.

    Returns:
        The normed rows in ``x``'s dtype; with a residual, the pair (normed rows, sum).

    Raises:
        ValueError: an operand does not fit; says got and wanted.

    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.
    """
    _check_rows(x, residual)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _check_like(name, vector, x.shape[1:], torch.float32, x.device)
    if x.numel() == 0:
        return x if residual is None else (x, residual)
    call = registry.Call(x.device.type, x.dtype, numerics, m=x.shape[0])
    return registry.select("layer_norm", call).function(x, weight, bias, eps, residual=residual)


def _check_rows(x: torch.Tensor, residual: torch.Tensor | None) -> None:
    if x.ndim != 2 or not x.is_contiguous():
        got = f"{tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(f"x: got {got}, wanted contiguous (M, D)")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: got {x.dtype}, wanted one of {', '.join(map(str, _DTYPES))}")
    if x.shape[1] > _MAX_FEATURES:
        raise ValueError(f"x: got {x.shape[1]} features, wanted at most {_MAX_FEATURES}")
    if residual is not None:
        _check_like("residual", residual, x.shape, x.dtype, x.device)


def _check_like(
    name: str, x: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    if (x.shape, x.dtype, x.device) != (shape, dtype, device) or not x.is_contiguous():
        got = f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        wanted = f"contiguous {dtype} {tuple(shape)} on {device}"
        raise ValueError(f"{name}: got {got}, wanted {wanted}")
