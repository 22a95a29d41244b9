"""Low-rank terms of adapters in plain torch: the truth, on any device.

Both products are those of ``quant_matmul``'s reference, whose shapes do not depend on the number of
rows: a row's bits depend on that row and its adapter alone.

Shapes: M rows of a step, P of them with an adapter, K inputs, N outputs.
"""

from __future__ import annotations

from torch import Tensor

from oxillama_torch.kernels.lora.op import RowGroups
from oxillama_torch.kernels.quant_matmul.reference import quant_matmul
from oxillama_torch.kernels.registry import register

__all__ = ["lora"]


@register("lora", "reference")
def lora(y: Tensor, x: Tensor, groups: RowGroups, first: int, sizes: tuple[int, ...]) -> None:
    """Reference of :func:`oxillama_torch.kernels.lora.op.lora`, without the gains."""
    for slot, terms in enumerate(groups.entries(first, len(sizes))):
        places = slice(groups.starts[slot], groups.starts[slot + 1])
        rows, scales = groups.rows[places], groups.scales[places, None]
        chosen = x[rows].float()
        for part, entry in enumerate(terms):
            if entry is None:
                continue
            columns = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
            term = quant_matmul(quant_matmul(chosen, entry.a), entry.b)
            y[rows, columns] = (y[rows, columns].float() + scales * term).to(y.dtype)
