"""What a model's decoding on a CPU wants compiled beside its matrix products."""

from __future__ import annotations

import torch

from oxillama_torch.kernels.activation import compiled as activation
from oxillama_torch.kernels.attention import compiled as attention
from oxillama_torch.kernels.norm import compiled as norm
from oxillama_torch.kernels.rope import compiled as rope
from oxillama_torch.models.decoder import Decoder, DecoderLayer

__all__ = ["compile_few_rows"]


def compile_few_rows(
    model: Decoder, *, page_size: int, page_dtype: torch.dtype, large: bool
) -> None:
    """Compile the kernels of few rows for a model's shapes, so that serving compiles nothing.

    Args:
        model: with ``fast`` numerics on a CPU; others have no such kernels.
        page_size, page_dtype: of the pages of keys and values.
        large: whether the seconds of compiling pay where no rule asks for these kernels.
    """
    if model.device.type != "cpu" or model.numerics != "fast":
        return
    norm.prepare(even_if_small=large)
    for layer in model.layers:
        activation.prepare(layer.ffn.activation, even_if_small=large)
        _compile_attention(layer, model, page_size, page_dtype, large)


def _compile_attention(
    layer: DecoderLayer, model: Decoder, page_size: int, page_dtype: torch.dtype, large: bool
) -> None:
    part, config = layer.attention, model.config
    shared = {
        "dim": config.key_dim,
        "value_dim": config.value_dim,
        "page_size": page_size,
        "page_dtype": page_dtype,
        "even_if_small": large,
    }
    norms = part.norms or (None, None)
    rope.prepare(
        style=part.rope.style,
        pairs=len(part.rope.inv_freq),
        normed=(norms[0] is not None, norms[1] is not None),
        **shared,
    )
    attention.prepare(
        heads=part.num_heads,
        kv_heads=part.num_kv_heads,
        scale=part.scale,
        window=part.window,
        **shared,
    )
