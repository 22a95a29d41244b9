"""Embedding lookup in a packed table in plain torch.

Shapes: T tokens, V rows of the table, K features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import register

__all__ = ["embedding"]


@register("embedding", "reference")
def embedding(ids: torch.Tensor, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Reference of :func:`oxillama_torch.kernels.embedding.op.embedding`."""
    planes = {name: plane.index_select(0, ids) for name, plane in weight.planes.items()}
    return weight.format.dequantize_planes(planes).to(dtype)
