"""The adapters of a step, as linear layers see them.

M rows of a step, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from oxillama_torch.kernels.lora.op import RowGroups, lora

__all__ = ["AdapterBatch"]


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
        base = y_MN.clone() if self._has_gain(first, len(parts)) else None
        for groups in self._rounds:
            lora(
                y_MN, x_MK, groups, first, tuple(parts.values()),
                base=base, bias=bias, numerics=numerics,
            )  # fmt: skip
        return y_MN

    def _has_gain(self, first: int, parts: int) -> bool:
        return any(
            entry is not None and entry.gain is not None
            for groups in self._rounds
            for terms in groups.entries(first, parts)
            for entry in terms
        )
