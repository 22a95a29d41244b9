"""Launcher of RMSNorm, with an optional residual sum.

Shapes: M rows, D features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry

__all__ = ["rms_norm"]

registry.declare(
    "rms_norm",
    "oxillama_torch.kernels.norm.reference",
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
        ValueError: shapes, dtypes or devices do not fit.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(
            f"x is {tuple(x.shape)}, strides {x.stride()}: contiguous [M, D] is wanted"
        )
    if x.shape[1] > 16384:
        raise ValueError(f"x has {x.shape[1]} features: at most 16384 are served")
    if tuple(weight.shape) != (x.shape[1],) or weight.dtype != torch.float32:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}: float32 [{x.shape[1]}] is wanted"
        )
    if weight.device != x.device or not weight.is_contiguous():
        raise ValueError(f"weight is on {weight.device}: contiguous on {x.device} is wanted")
    if residual is not None and (
        residual.shape != x.shape
        or residual.dtype != x.dtype
        or residual.device != x.device
        or not residual.is_contiguous()
    ):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}: "
            f"contiguous {x.dtype} {tuple(x.shape)} on {x.device} is wanted"
        )
    if x.numel() == 0:
        return x if residual is None else (x, residual)
    call = registry.Call(x.device.type, x.dtype, numerics, m=x.shape[0])
    return registry.select("rms_norm", call).function(x, weight, eps, residual=residual)
