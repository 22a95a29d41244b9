"""RMSNorm in eager torch.

Shapes: M rows, D features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels.registry import register

__all__ = ["rms_norm"]


@register("rms_norm", "reference")
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm; a row's bits depend on that row alone.

    torch divides a contiguous row's sum among threads only when it is the sole output and has
    32768 elements or more, which the launcher's bound on D excludes.

    Args and errors: as ``op.rms_norm``, which checks them.
    """
    summed = x if residual is None else x + residual
    wide = summed.float()
    mean_square = (wide * wide).mean(-1, keepdim=True)
    normed = (wide * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)
    return normed if residual is None else (normed, summed)
