"""Launcher of the embedding lookup in a packed table: checks, choice of backend, call.

Shapes: T tokens, V rows of the table, K features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor

__all__ = ["embedding"]


def embedding(
    ids: torch.Tensor,
    weight: PackedTensor,
    dtype: torch.dtype = torch.float32,
    *,
    numerics: str = "invariant",
) -> torch.Tensor:
    """``y[i] = dequantize(weight)[ids[i]]``; only the rows asked for are dequantized.

    Args:
        ids: int64 [T], each in ``0 .. V - 1``.
        weight: packed table of shape (V, K).
        dtype: floating dtype of the result.
        numerics: ``"invariant"`` or ``"fast"``; the rows are exact in both.

    Returns:
        [T, K] in ``dtype``.

    Raises:
        ValueError: a shape, dtype or device that does not fit; says got and wanted.
        UnsupportedError: no backend, or none that a rule allows, serves the call.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids: got {ids.dtype} {tuple(ids.shape)}, wanted torch.int64 (T,)")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, wanted a floating dtype")
    for name, plane in weight.planes.items():
        if plane.device != ids.device:
            raise ValueError(
                f"weight plane {name!r}: got device {plane.device}, wanted {ids.device} like ids"
            )
    if len(ids) == 0:
        return torch.empty(0, weight.shape[1], dtype=dtype, device=ids.device)
    call = registry.Call(
        device=ids.device.type,
        dtype=dtype,
        numerics=numerics,
        type=weight.format.name,
        m=len(ids),
    )
    return registry.select("embedding", call).function(ids, weight, dtype)


_HERE = "oxillama_torch.kernels.embedding"
registry.declare("embedding", f"{_HERE}.reference", f"{_HERE}.triton_embedding")
