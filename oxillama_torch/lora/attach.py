"""Adapters beside packed weights: factors on the device, and who uses which in a step.

N outputs, K inputs, r rank, R rank padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.lora.op import FactorTable, LowRank, RowGroups, padded_rank
from oxillama_torch.layers.lora import (
    AdapterBatch,
    EmbeddingTerm,
    ExpertTerm,
    OtherEmbedding,
    OtherLinear,
    OtherNorm,
    Special,
)
from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.targets import Targets
from oxillama_torch.lora.terms import LoraTerm, Term

__all__ = ["adapter_batch", "dora_factor", "factor_table", "lengths", "table_bytes"]

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

#: A request's adapters and their scales, in its order.
Uses = Sequence[tuple[FactorTable, float]]


def factor_table(adapter: Adapter, targets: Targets) -> FactorTable:
    """Put an adapter's factors on the model's device, in the dtype of its activations."""
    entries: list[LowRank | None] = [None] * len(targets.numbers)
    special: dict[str, Special] = {}
    for stem, term in adapter.terms.items():
        if isinstance(term, LoraTerm) and stem in targets.numbers:
            entries[targets.numbers[stem]] = _low_rank(stem, term, targets)
        else:
            special[stem] = _special(stem, term, targets)
    return FactorTable(entries, targets.device, special)


def table_bytes(table: FactorTable) -> int:
    """Bytes that a table's factors take on the device."""
    parts = [entry for entry in table.entries if entry is not None]
    parts += table.special.values()
    held = [getattr(part, field) for part in parts for field in part.__slots__]
    return sum(value.nbytes for value in held if value is not None)


def dora_factor(stem: str, term: LoraTerm, targets: BaseWeights) -> Tensor:
    """``m / |W + scaling B A|`` by row, float32 [N] on the CPU (section 4.3 of the DoRA paper).

    Of the embedding by column, [D].
    """
    assert term.magnitude is not None, f"{stem} has no magnitude"
    return term.magnitude / lengths(stem, targets, term)


def lengths(stem: str, targets: BaseWeights, term: LoraTerm | None = None) -> Tensor:
    """``|W|``, or ``|W + scaling B A|``: what DoRA's magnitudes are measured in, on the CPU."""
    changed = (
        w if term is None else w + term.delta(rows).to(w.device) for rows, w in targets.chunks(stem)
    )
    if targets.kind(stem) == "embedding":
        squares = sum(rows.square().sum(0, dtype=torch.float64) for rows in changed)
        return squares.sqrt().float().cpu()
    return torch.cat([rows.norm(dim=1) for rows in changed]).cpu()


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
    b = term.lora_B * term.scaling
    if factor is not None:
        b *= factor[:, None]
    return LowRank(
        _pack(_padded(term.lora_A, -2), targets),
        _pack(_padded(b, -1), targets),
        _gain(factor, targets),
    )


def _special(stem: str, term: Term, targets: Targets) -> Special:
    kind = targets.kind(stem)
    if isinstance(term, LoraTerm):
        if kind == "experts":
            a, b = _padded(term.lora_A, -2), _padded(term.lora_B * term.scaling, -1)
            return ExpertTerm(_pack(a.flatten(0, 1), targets), _pack(b.flatten(0, 1), targets))
        factor = None if term.magnitude is None else dora_factor(stem, term, targets)
        back = term.lora_A.T * term.scaling
        if factor is not None:
            back = back * factor[:, None]
        rows, back = _padded(term.lora_B, -1), _padded(back, -1)
        return EmbeddingTerm(_pack(rows, targets), _pack(back, targets), _gain(factor, targets))
    if kind == "norm":
        weight = targets.norms[stem].weight
        return OtherNorm(term.weight.to(weight) - weight)
    weight = _pack(term.weight, targets)
    if kind == "embedding":
        return OtherEmbedding(weight)
    place = targets.places[stem]
    bias = place.linear.bias
    if bias is not None:
        rows = slice(place.start, place.start + len(term.weight))
        bias = bias[rows] if term.bias is None else term.bias.to(bias)
    return OtherLinear(weight, bias)


def _gain(factor: Tensor | None, targets: Targets) -> Tensor | None:
    return None if factor is None else (factor - 1).to(targets.device)


def _padded(values: Tensor, dim: int) -> Tensor:
    """Ranks, which stand in dimension ``dim``, filled up with zeros to whole tiles."""
    missing = padded_rank(values.shape[dim]) - values.shape[dim]
    return torch.nn.functional.pad(values, (0, 0, 0, missing) if dim == -2 else (0, missing))


def _pack(values: Tensor, targets: Targets) -> PackedTensor:
    data = values.to(targets.device, targets.dtype).contiguous().view(torch.uint8).flatten()
    return PackedTensor.from_bytes(_TYPES[targets.dtype], data, tuple(values.shape))
