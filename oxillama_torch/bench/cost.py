"""What a kernel call must at least move and compute, from its arguments.

Shapes: M rows, N outputs, K inputs; T query tokens, H heads, D head dim, S keys per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oxillama_torch.kernels.formats.base import PackedTensor

__all__ = ["cost_of"]


def cost_of(op: str, args: Sequence[Any], out: Any) -> tuple[int, int]:
    """(bytes, floating-point operations) of one call.

    Args:
        op: name of the op; one that is not known counts the bytes of its tensors.
        args: positional arguments of the backend.
        out: its result.
    """
    special = {
        "attention": _attention,
        "embedding": _embedding,
        "rope_store_kv": _rope,
        "quant_matmul": _matmul,
        "quant_matmul_experts": _experts,
        "quant_matmul_gated": _matmul,
        "quant_matmul_residual": _residual,
        "quant_matmul_segments": _segments,
    }.get(op)
    return special(args, out) if special else (_nbytes(args) + _nbytes(out), 0)


def _matmul(args: Sequence[Any], out: torch.Tensor) -> tuple[int, int]:
    x, weight = args[0], args[1]
    flops = 2 * x.shape[0] * weight.shape[0] * weight.shape[1]
    return weight.nbytes + _nbytes((x, out)), flops


def _residual(args: Sequence[Any], out: torch.Tensor) -> tuple[int, int]:
    nbytes, flops = _matmul(args, out)
    return nbytes + _nbytes(args[3]), flops


def _segments(args: Sequence[Any], outs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The input is read once."""
    x, weights = args[0], args[1]
    flops = sum(2 * len(x) * weight.shape[0] * weight.shape[1] for weight in weights)
    return _nbytes(weights) + _nbytes(x) + _nbytes(outs), flops


def _experts(args: Sequence[Any], out: torch.Tensor) -> tuple[int, int]:
    """Only the experts that some row goes to are read."""
    x, weight, expert_ids, count = args[:4]
    used = int(expert_ids.unique().numel())
    flops = 2 * x.shape[0] * weight.shape[0] // count * weight.shape[1]
    return weight.nbytes * used // count + _nbytes((x, out)), flops


def _embedding(args: Sequence[Any], out: torch.Tensor) -> tuple[int, int]:
    ids, weight = args[0], args[1]
    return weight.nbytes // weight.shape[0] * len(ids) + _nbytes((ids, out)), 0


def _rope(args: Sequence[Any], out: Any) -> tuple[int, int]:
    """q, k and v in; q, and k and v into the pages, out."""
    return 2 * _nbytes(args[:3]), 0


def _attention(args: Sequence[Any], out: torch.Tensor) -> tuple[int, int]:
    """Keys and values up to each request's end are read; scores and sums are computed."""
    q, k_pages, v_pages, _, query_start, seq_lens = args[:6]
    keys = seq_lens.long()
    per_key = k_pages[0, 0].numel() + v_pages[0, 0].numel()
    nbytes = int(keys.sum()) * per_key * k_pages.element_size() + _nbytes((q, out))
    queries = query_start[1:].long() - query_start[:-1].long()
    # Query j of n sees S - n + j + 1 keys.
    seen = queries * keys - queries * (queries - 1) // 2
    flops = 2 * int(seen.sum()) * q.shape[1] * (q.shape[2] + out.shape[2])
    return nbytes, flops


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor | PackedTensor):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    return 0
