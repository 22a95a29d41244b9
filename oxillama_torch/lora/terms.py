"""What an adapter does to one tensor: a low-rank change of it, or another tensor in its place.

N outputs, K inputs, r rank, E experts, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LoraTerm", "Replacement", "Term"]


@dataclass(frozen=True, slots=True, eq=False)
class LoraTerm:
    """``W + scaling * B A``.

    With a magnitude m (DoRA, Liu et al. 2024), each row is then scaled to length m; each column,
    where W is the embedding.

    Args:
        lora_A: float32 [r, K]; [E, r, K] for a stack of experts; of the embedding (V, D), [r, D].
        lora_B: float32 [N, r] or [E, N, r], rows in the order of the file's weight.
        scaling: factor of the product.
        magnitude: float32 [N] or None; [D] for the embedding.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    def tensors(self) -> list[Tensor]:
        """All tensors of the term."""
        return [self.lora_A, self.lora_B, *([] if self.magnitude is None else [self.magnitude])]

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """``scaling * B A`` for some rows, float32 [n, K]; of a stack, rows of one expert."""
        if self.lora_A.ndim == 2:
            return self.scaling * (self.lora_B[rows] @ self.lora_A)
        outputs = self.lora_B.shape[1]
        expert, start = divmod(rows.start, outputs)
        stop = start + rows.stop - rows.start
        assert stop <= outputs, f"rows {rows} belong to several experts of {outputs}"
        return self.scaling * (self.lora_B[expert, start:stop] @ self.lora_A[expert])


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """Another tensor in the place of the model's: what peft calls ``modules_to_save``.

    At scale s a request sees ``W + s * (W' - W)``; peft knows scale 1 alone.

    Args:
        weight: (N, K) or, of a norm, [D], any floating dtype, rows in the order of the file.
        bias: [N], where the layer has one and it was saved too.
    """

    weight: Tensor
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors of the term."""
        return [self.weight, *([] if self.bias is None else [self.bias])]


Term = LoraTerm | Replacement
