"""Adapters added into weights: the touched layers get new tensors, the old ones are kept.

N outputs, K inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.formats.base import PackedTensor, get
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.attach import dora_factor
from oxillama_torch.lora.targets import Targets
from oxillama_torch.lora.terms import LoraTerm

__all__ = ["MERGE_DTYPES", "Merge", "MergeReport", "Merger", "encode"]

MERGE_DTYPES = ("f16", "f32", "q8_0")


@dataclass(frozen=True, slots=True)
class Merge:
    """An adapter to be merged: ``W + scale * (what the adapter changes)``, kept as ``dtype``."""

    adapter: Adapter
    scale: float
    dtype: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What encoding the merged weights cost.

    Args:
        tensors: layers that were changed.
        bytes_before, bytes_after: of these layers.
        weight_error: root mean square error of the encoded weights over that of the weights.
        change_error: the same error over the change that the adapters make.
    """

    tensors: int
    bytes_before: int
    bytes_after: int
    weight_error: float
    change_error: float


class _Sums:
    """Squares summed over all tensors, float64."""

    def __init__(self) -> None:
        self.error = self.weight = self.change = 0.0

    def add(self, old: Tensor, exact: Tensor, encoded: Tensor) -> None:
        self.error += float((encoded - exact).double().square().sum())
        self.weight += float(exact.double().square().sum())
        self.change += float((exact - old).double().square().sum())


class Merger:
    """Works out merged weights and puts them in place.

    ``prepare`` computes and changes nothing: any thread may call it. ``swap`` exchanges tensors
    and must not run beside a step.

    Args:
        targets: the model's layers.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._products: dict[nn.Module, list[QuantLinear]] = {}
        for place in targets.places.values():
            products = self._products.setdefault(place.owner, [])
            if place.linear not in products:
                products.append(place.linear)
        self._weights = {p: p.weight for group in self._products.values() for p in group}

    def prepare(
        self, merges: Sequence[Merge]
    ) -> tuple[dict[nn.Module, list[QuantLinear]], MergeReport]:
        """Layers with these adapters in them, and no others.

        Raises:
            UnsupportedError: a dtype that is not known or cannot hold a weight.
        """
        tensors: dict[str, PackedTensor] = {}
        sums = _Sums()
        for stem in self._targets.places:
            own = [merge for merge in merges if stem in merge.adapter.terms]
            if own:
                tensors[stem] = self._merged(stem, own, sums)
        before = sum(self._targets.places[stem].weight.nbytes for stem in tensors)
        after = sum(tensor.nbytes for tensor in tensors.values())
        error = math.sqrt(sums.error)
        report = MergeReport(
            len(tensors),
            before,
            after,
            error / math.sqrt(sums.weight) if sums.weight else 0.0,
            error / math.sqrt(sums.change) if sums.change else 0.0,
        )
        layers = {o: self._rebuild(group, tensors) for o, group in self._products.items()}
        return layers, report

    def swap(self, layers: Mapping[nn.Module, list[QuantLinear]]) -> None:
        """Put prepared layers in place; original ones come back as the objects they were."""
        for owner, products in layers.items():
            if isinstance(owner, LinearGroup):
                owner.linears = nn.ModuleList(products)
            else:  # a product of its own, which keeps its place and gets the weight
                [product] = products
                owner.weight = self._weights[owner] if product is owner else product.weight

    def _merged(self, stem: str, merges: Sequence[Merge], sums: _Sums) -> PackedTensor:
        """The sum of a weight and what several adapters make of it, as the last one's dtype."""
        terms = [(merge.adapter.terms[stem], merge.scale) for merge in merges]
        factors = [
            None if term.magnitude is None else dora_factor(stem, term, self._targets)
            for term, _ in terms
        ]
        type_name = _type_name(merges[-1].dtype)
        encoded = []
        for rows, old in self._targets.chunks(stem):
            exact = old.clone()
            for (term, scale), factor in zip(terms, factors):
                exact += scale * _change(term, factor, rows, old)
            encoded.append(encode(type_name, exact, stem))
            sums.add(
                old,
                exact,
                get(type_name).dequantize(_blocks(type_name, encoded[-1])).view_as(exact),
            )
        shape = self._targets.places[stem].weight.shape
        return PackedTensor.from_bytes(type_name, torch.cat(encoded), shape)

    def _rebuild(
        self, products: Sequence[QuantLinear], tensors: Mapping[str, PackedTensor]
    ) -> list[QuantLinear]:
        """Products with new tensors in place of some of their parts; others stay as they are."""
        rebuilt = []
        for product in products:
            if tensors.keys().isdisjoint(product.parts):
                rebuilt.append(product)
                continue
            runs = itertools.groupby(
                product.parts, lambda stem: tensors[stem].format if stem in tensors else None
            )
            rebuilt += [self._run(product, list(stems), tensors) for _, stems in runs]
        return rebuilt

    def _run(
        self, product: QuantLinear, stems: list[str], tensors: Mapping[str, PackedTensor]
    ) -> QuantLinear:
        """A product of neighbouring parts that have one format."""
        start = self._targets.places[stems[0]].start
        parts = {stem: product.parts[stem] for stem in stems}
        stop = start + sum(parts.values())
        if stems[0] in tensors:
            weight = _stack([tensors[stem] for stem in stems])
        else:
            weight = self._weights[product].rows(start, stop)
        bias = None if product.bias is None else product.bias[start:stop]
        return QuantLinear(weight, bias, parts=parts, numerics=product.numerics)


def encode(type_name: str, values: Tensor, what: str = "a weight") -> Tensor:
    """Weights float32 [n, K] as the bytes of a GGML type, uint8 [bytes].

    Raises:
        UnsupportedError: the type cannot hold them.
    """
    if type_name == "F32":
        return values.contiguous().view(torch.uint8).flatten()
    if type_name == "F16":
        small = values.half()
        if not bool(torch.isfinite(small).all()):
            raise UnsupportedError(f"{what} merged as f16: it has values beyond 65504", ("f32",))
        return small.contiguous().view(torch.uint8).flatten()
    assert type_name == "Q8_0", f"no encoder for {type_name}"
    if values.shape[1] % 32:
        raise UnsupportedError(f"{what}: q8_0 rows of {values.shape[1]} weights", ("f16", "f32"))
    return _encode_q8_0(values)


def _encode_q8_0(values: Tensor) -> Tensor:
    """Blocks of 32 as gguf-py's ``quantize`` makes them: d = largest / 127, halves away from 0."""
    blocks = values.unflatten(1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * torch.where(d == 0, 0.0, 1 / d)
    magnitude = scaled.abs()
    floor = magnitude.floor()
    quants = scaled.sign() * (floor + (2 * (magnitude - floor)).floor())
    scales = d.half().view(torch.uint8)
    return torch.cat([scales, quants.to(torch.int8).view(torch.uint8)], dim=-1).flatten()


def _change(term: LoraTerm, factor: Tensor | None, rows: slice, old: Tensor) -> Tensor:
    """What an adapter at scale 1 adds to rows of a weight, float32 [n, K]."""
    delta = term.delta(rows).to(old.device)
    if factor is None:
        return delta
    return factor[rows, None].to(old.device) * (old + delta) - old


def _blocks(type_name: str, data: Tensor) -> Tensor:
    return data.view(-1, get(type_name).block_bytes)


def _stack(tensors: list[PackedTensor]) -> PackedTensor:
    """Matrices of one format below each other."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    blocks = [t.format.unpack(t.planes).flatten() for t in tensors]
    rows = sum(tensor.shape[0] for tensor in tensors)
    return PackedTensor.from_bytes(first.type_name, torch.cat(blocks), (rows, first.shape[1]))


def _type_name(dtype: str) -> str:
    if dtype not in MERGE_DTYPES:
        raise UnsupportedError(f"merge dtype {dtype!r}", MERGE_DTYPES)
    return dtype.upper()
