"""Adapters beside packed weights: factors on the device, and who uses which in a step.

N outputs, K inputs, r rank, R rank padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.lora.op import FactorTable, LowRank, RowGroups, padded_rank
from oxillama_torch.layers.lora import AdapterBatch
from oxillama_torch.lora.adapter import Adapter, LoraTerm
from oxillama_torch.lora.targets import Targets

__all__ = ["adapter_batch", "dora_factor", "factor_table", "table_bytes"]

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

#: A request's adapters and their scales, in its order.
Uses = Sequence[tuple[FactorTable, float]]


def factor_table(adapter: Adapter, targets: Targets) -> FactorTable:
    """Put an adapter's factors on the model's device, in the dtype of its activations."""
    entries = [
        _low_rank(stem, adapter.terms[stem], targets) if stem in adapter.terms else None
        for stem in targets.places
    ]
    return FactorTable(entries, targets.device)


def table_bytes(table: FactorTable) -> int:
    """Bytes that a table's factors take on the device."""
    return sum(entry.a.nbytes + entry.b.nbytes for entry in table.entries if entry is not None)


def dora_factor(stem: str, term: LoraTerm, targets: Targets) -> Tensor:
    """``m / |W + scaling B A|`` by row, float32 [N] on the CPU (section 4.3 of the DoRA paper)."""
    assert term.magnitude is not None, f"{stem} has no magnitude"
    norms = [(w + term.delta(rows).to(w.device)).norm(dim=1) for rows, w in targets.chunks(stem)]
    return term.magnitude / torch.cat(norms).cpu()


def adapter_batch(
    numbers: Mapping[str, int], uses: Sequence[Uses], counts: Sequence[int], device: torch.device
) -> AdapterBatch | None:
    """The adapters of a step.

    Args:
        numbers: see AdapterBatch.
        uses: of each request.
        counts: tokens of each request in the step, one request after the other.

    Returns: None when no request has an adapter.
    """
    rounds = [
        _round([use[index : index + 1] for use in uses], counts, device)
        for index in range(max(map(len, uses), default=0))
    ]
    return AdapterBatch(numbers, rounds) if rounds else None


def _round(uses: Sequence[Uses], counts: Sequence[int], device: torch.device) -> RowGroups:
    """Group rows by adapter; each request has one or none here."""
    groups: dict[int, tuple[FactorTable, list[int], list[float]]] = {}
    start = 0
    for use, count in zip(uses, counts):
        for table, scale in use:
            _, rows, scales = groups.setdefault(id(table), (table, [], []))
            rows += range(start, start + count)
            scales += [scale] * count
        start += count
    members = list(groups.values())
    return RowGroups(
        [table for table, _, _ in members],
        [slot for slot, (_, rows, _) in enumerate(members) for _ in rows],
        [row for _, rows, _ in members for row in rows],
        [scale for _, _, scales in members for scale in scales],
        device,
    )


def _low_rank(stem: str, term: LoraTerm, targets: Targets) -> LowRank:
    factor = None if term.magnitude is None else dora_factor(stem, term, targets)
    rank = padded_rank(term.rank)
    a = torch.zeros(rank, term.lora_A.shape[1])
    a[: term.rank] = term.lora_A
    b = torch.zeros(term.lora_B.shape[0], rank)
    b[:, : term.rank] = term.lora_B * term.scaling
    if factor is not None:
        b *= factor[:, None]
    gain = None if factor is None else (factor - 1).to(targets.device)
    return LowRank(_pack(a, targets), _pack(b, targets), gain)


def _pack(values: Tensor, targets: Targets) -> PackedTensor:
    data = values.to(targets.device, targets.dtype).view(torch.uint8).flatten()
    return PackedTensor.from_bytes(_TYPES[targets.dtype], data, tuple(values.shape))
