"""The adapters of a step, as layers see them.

Low-rank terms of linear layers go through the ``lora`` op, all adapters and layers of a product in
one call. What else an adapter may bring is rarer and goes adapter by adapter, through the ops of
the layers themselves: other tensors in the place of the model's, and terms of the embedding and of
experts. A row's bits depend on that row and its adapters alone either way.

M rows of a step, G of them with one adapter, K inputs, N outputs, R rank padded to whole tiles,
V vocabulary, D hidden size, E experts, C experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oxillama_torch.kernels.embedding.op import embedding
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.lora.op import RowGroups, lora
from oxillama_torch.kernels.norm.op import rms_norm
from oxillama_torch.kernels.quant_matmul.op import quant_matmul, quant_matmul_experts

__all__ = [
    "EMBEDDING",
    "HEAD",
    "AdapterBatch",
    "EmbeddingTerm",
    "ExpertTerm",
    "OtherEmbedding",
    "OtherLinear",
    "OtherNorm",
    "Special",
]

#: What the head is called among the layers, tied to the embedding or not.
HEAD = "output"
EMBEDDING = "token_embd"


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTerm:
    """``y = W[i] + A'[i] B'`` and, with DoRA, columns scaled.

    Args:
        rows: (V, R), an unquantized format.
        back: (D, R).
        gain: float32 [D] or None; magnitude over norm, less one, of each column.
    """

    rows: PackedTensor
    back: PackedTensor
    gain: Tensor | None = None

    def change(self, ids_G: Tensor, base_GD: Tensor) -> Tensor:
        """What it adds to the rows ``base`` of the model's embedding, float32 [G, D]."""
        h_GR = embedding(ids_G, self.rows, torch.float32)
        y_GD = quant_matmul(h_GR, self.back)
        return y_GD if self.gain is None else y_GD + self.gain * base_GD.float()


@dataclass(frozen=True, slots=True, eq=False)
class OtherEmbedding:
    """Another table (V, D) in the place of the model's."""

    weight: PackedTensor

    def change(self, ids_G: Tensor, base_GD: Tensor) -> Tensor:
        """What it adds to the rows ``base`` of the model's embedding, float32 [G, D]."""
        return embedding(ids_G, self.weight, torch.float32) - base_GD.float()


@dataclass(frozen=True, slots=True, eq=False)
class OtherLinear:
    """Another weight (N, K), and bias float32 [N], in the place of a linear layer's."""

    weight: PackedTensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class OtherNorm:
    """``change`` float32 [D]: another norm's weight less the model's."""

    change: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTerm:
    """``y = W_e x + B_e A_e x`` for every expert e; a (E * R, K), b (E * N, R)."""

    a: PackedTensor
    b: PackedTensor


Special = EmbeddingTerm | OtherEmbedding | OtherLinear | OtherNorm | ExpertTerm


class AdapterBatch:
    """Which rows of a step have which adapters, and how to add what they add.

    A row's adapters are added in the order in which its request names them, one round each.

    Args:
        numbers: name of a tensor in the file, such as ``blk.0.attn_q`` -> its number in the
            adapters' tables; those of one fused product follow each other.
        rounds: rows with their first adapters, with their second ones, and so on.
    """

    def __init__(self, numbers: Mapping[str, int], rounds: Sequence[RowGroups]) -> None:
        self._numbers, self._rounds = numbers, tuple(rounds)
        self._special = {
            stem for groups in rounds for table in groups.tables for stem in table.special
        }

    def add(
        self,
        y_MN: Tensor,
        x_MK: Tensor,
        parts: Mapping[str, int],
        bias: Tensor | None,
        numerics: str,
    ) -> Tensor:
        """Add to the outputs ``y`` of a layer for inputs ``x`` what the adapters say; in place.

        Args:
            parts: name in the file -> outputs, of the layer or of those that were fused in it.
            bias: float32 [N], already in ``y``.
        """
        first = self._numbers.get(next(iter(parts)))
        if first is None:
            return y_MN
        others = not self._special.isdisjoint(parts)
        base = y_MN.clone() if others or self._has_gain(first, len(parts)) else None
        for groups in self._rounds:
            lora(
                y_MN, x_MK, groups, first, tuple(parts.values()),
                base=base, bias=bias, numerics=numerics,
            )  # fmt: skip
        if others:
            self._add_others(y_MN, x_MK, parts, base, numerics)
        return y_MN

    def add_embedding(self, y_MD: Tensor, ids_M: Tensor) -> None:
        """Add to the rows ``y`` of the embedding table what the adapters say; in place."""
        if EMBEDDING not in self._special:
            return
        base = y_MD.clone()
        for term, rows, scales in self._uses(EMBEDDING):
            _accumulate(y_MD, rows, scales * term.change(ids_M[rows], base[rows]))

    def add_experts(
        self,
        y: Tensor,
        x: Tensor,
        ids: Tensor,
        stack: str,
        num_experts: int,
        num_chosen: int,
        numerics: str,
    ) -> None:
        """Add to the outputs of experts what the adapters say; in place.

        Args:
            y, x: [M * C, N] and [M * C, K]: C rows of every row of the step.
            ids: int64 [M * C], the expert of each.
            stack: name in the file, such as ``blk.0.ffn_up_exps``.
            num_experts, num_chosen: E and C.
        """
        if stack not in self._special:
            return
        chosen = torch.arange(num_chosen, device=y.device)
        for term, rows, scales in self._uses(stack):
            places = (rows[:, None] * num_chosen + chosen).flatten()
            h = x[places].float()
            for factor in (term.a, term.b):
                h = quant_matmul_experts(h, factor, ids[places], num_experts, numerics=numerics)
            _accumulate(y, places, scales.repeat_interleave(num_chosen, dim=0) * h)

    def add_norm(self, y_MD: Tensor, x_MD: Tensor, name: str, eps: float, numerics: str) -> None:
        """Add to ``y``, the norm of ``x``, what adapters with another weight make of it."""
        if name not in self._special:
            return
        for term, rows, scales in self._uses(name):
            normed = rms_norm(x_MD[rows].float(), term.change, eps, numerics=numerics)
            _accumulate(y_MD, rows, scales * normed)

    def _add_others(
        self, y_MN: Tensor, x_MK: Tensor, parts: Mapping[str, int], base: Tensor, numerics: str
    ) -> None:
        start = 0
        for stem, size in parts.items():
            columns = slice(start, start + size)
            for term, rows, scales in self._uses(stem):
                other = quant_matmul(x_MK[rows].float(), term.weight, term.bias, numerics=numerics)
                change = other - base[rows, columns].float()
                _accumulate(y_MN[:, columns], rows, scales * change)
            start += size

    def _uses(self, stem: str) -> Iterator[tuple[Special, Tensor, Tensor]]:
        """(what is special about a tensor, rows int64 [G], scales float32 [G, 1]) by adapter."""
        for groups in self._rounds:
            for slot, table in enumerate(groups.tables):
                if stem in table.special:
                    places = slice(groups.starts[slot], groups.starts[slot + 1])
                    yield table.special[stem], groups.rows[places], groups.scales[places, None]

    def _has_gain(self, first: int, parts: int) -> bool:
        return any(
            entry is not None and entry.gain is not None
            for groups in self._rounds
            for terms in groups.entries(first, parts)
            for entry in terms
        )


def _accumulate(y: Tensor, rows: Tensor, change: Tensor) -> None:
    """``y[rows] += change``, summed in float32; every row stands there once."""
    y[rows] = (y[rows].float() + change).to(y.dtype)
