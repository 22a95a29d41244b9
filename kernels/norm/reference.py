"""RMSNorm and LayerNorm in eager torch.

A row's bits depend on that row alone: torch divides a contiguous row's sum among threads only when
it is the sole output and has 32768 elements or more, which the launchers' bound on D excludes.

Shapes: M rows, D features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels.registry import register

__all__ = ["layer_norm", "rms_norm", "rms_norm_quantized"]


@register("rms_norm", "reference")
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Reference of :func:`oxillama_torch.kernels.norm.op.rms_norm`."""
    summed = x if residual is None else x + residual
    wide = summed.float()
    mean_square = (wide * wide).mean(-1, keepdim=True)
    normed = (wide * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)
    return normed if residual is None else (normed, summed)


@register("rms_norm_quantized", "reference")
def rms_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Reference of :func:`oxillama_torch.kernels.norm.op.rms_norm_quantized`.

    Returns: normed [M, D], values int8 [M, D], scales and sums float32 [M, G], the sum [M, D].
    """
    normed = rms_norm(x, weight, eps, residual=residual)
    normed, summed = (normed, x) if residual is None else normed
    groups = normed.float().unflatten(1, (-1, 32))
    scales = groups.abs().amax(-1) / 127
    quants = (groups / torch.where(scales > 0, scales, 1).unsqueeze(-1)).round()
    return normed, quants.flatten(1).to(torch.int8), scales, scales * quants.sum(-1), summed


@register("layer_norm", "reference")
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Reference of :func:`oxillama_torch.kernels.norm.op.layer_norm`."""
    summed = x if residual is None else x + residual
    wide = summed.float()
    centred = wide - wide.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(variance + eps) * weight
    normed = (normed if bias is None else normed + bias).to(x.dtype)
    return normed if residual is None else (normed, summed)
