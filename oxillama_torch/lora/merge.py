"""Adapters added into a loaded model's weights: new tensors are put in place, old ones are kept.

N outputs, K inputs, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.layers.moe import MixtureOfExperts
from oxillama_torch.lora.encode import MERGE_DTYPES, Rounding, TensorReport
from oxillama_torch.lora.merged import Merge, MergedTensor, merged_bias, merged_norm, touching
from oxillama_torch.lora.targets import Targets

__all__ = ["MERGE_DTYPES", "Merge", "MergeReport", "Merger", "Parts"]

#: (module, attribute) -> its value.
Parts = Mapping[tuple[nn.Module, str], Any]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What encoding the merged weights cost.

    Args:
        tensors: how many were changed.
        bytes_before, bytes_after: of these.
        weight_error: root mean square error of the encoded weights over that of the weights.
        change_error: the same error over the change that the adapters make.
        details: matrix by matrix; norms are kept as they are.
    """

    tensors: int
    bytes_before: int
    bytes_after: int
    weight_error: float
    change_error: float
    details: tuple[TensorReport, ...] = ()


class Merger:
    """Works out merged weights and puts them in place.

    ``prepare`` computes and changes nothing: any thread may call it. ``swap`` exchanges tensors
    and must not run beside a step.

    Args:
        targets: the model's tensors; nothing is merged into them.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._products: dict[nn.Module, list[QuantLinear]] = {}
        for place in targets.places.values():
            products = self._products.setdefault(place.owner, [])
            if place.linear not in products:
                products.append(place.linear)
        self._weights = {p: p.weight for group in self._products.values() for p in group}
        self._original = dict(self._parts())

    def prepare(self, merges: Sequence[Merge]) -> tuple[Parts, MergeReport]:
        """Everything that merging may exchange, with these adapters in it and no others.

        Raises:
            UnsupportedError: a dtype that is not known or cannot hold a weight.
        """
        tensors: dict[str, PackedTensor] = {}
        details: list[TensorReport] = []
        total, parts = Rounding(), dict(self._original)
        touched = [stem for stem in self._targets.shapes if touching(merges, stem)]
        for stem in touched:
            own = touching(merges, stem)
            if self._targets.kind(stem) == "norm":
                norm = self._targets.norms[stem]
                original = self._original[norm, "weight"]
                parts[norm, "weight"] = merged_norm(stem, original, own)
                continue
            merged = MergedTensor(stem, own, self._targets, self._targets.type_name(stem))
            data = torch.cat(list(merged.pieces()))
            shape = self._targets.matrix_shape(stem)
            tensors[stem] = PackedTensor.from_bytes(merged.type_name, data, shape)
            total.include(merged.rounding)
            details.append(merged.report())
        self._place(parts, tensors, merges)
        norms = sum(self._targets.nbytes(stem) for stem in touched if stem not in tensors)
        report = MergeReport(
            len(touched),
            sum(self._targets.nbytes(stem) for stem in touched),
            sum(tensor.nbytes for tensor in tensors.values()) + norms,
            total.weight_error,
            total.change_error,
            tuple(details),
        )
        return parts, report

    @staticmethod
    def weights(parts: Parts) -> list[PackedTensor]:
        """The matrices among prepared parts that a model with them multiplies with."""
        linears = [
            linear for (_, name), value in parts.items() if name == "linears" for linear in value
        ]
        alone = [
            value
            for (module, name), value in parts.items()
            if name == "weight" and isinstance(module, QuantLinear)
        ]
        return [*alone, *(linear.weight for linear in linears)]

    def swap(self, parts: Parts) -> None:
        """Put prepared parts in place; original ones come back as the objects they were."""
        for (module, name), value in parts.items():
            setattr(module, name, value)

    def _parts(self) -> Iterator[tuple[tuple[nn.Module, str], Any]]:
        """What stands where merging may exchange something."""
        for owner in self._products:
            names = ("linears",) if isinstance(owner, LinearGroup) else ("weight", "bias")
            yield from (((owner, name), getattr(owner, name)) for name in names)
        embedding = self._targets.decoder.embedding
        yield (embedding, "weight"), embedding.weight
        for norm in self._targets.norms.values():
            yield (norm, "weight"), norm.weight
        for module in dict.fromkeys(self._targets.experts.values()):
            yield from (((module, name), getattr(module, name)) for name in ("gate_up", "down"))

    def _place(
        self,
        parts: dict[tuple[nn.Module, str], Any],
        tensors: Mapping[str, PackedTensor],
        merges: Sequence[Merge],
    ) -> None:
        """Put merged matrices into the modules that hold them."""
        for owner, products in self._products.items():
            if all(tensors.keys().isdisjoint(product.parts) for product in products):
                continue
            rebuilt = self._rebuild(products, tensors, merges)
            if isinstance(owner, LinearGroup):
                parts[owner, "linears"] = nn.ModuleList(rebuilt)
            else:  # a product of its own, which keeps its place
                [product] = rebuilt
                parts[owner, "weight"], parts[owner, "bias"] = product.weight, product.bias
        if "token_embd" in tensors:
            parts[self._targets.decoder.embedding, "weight"] = tensors["token_embd"]
        for module in dict.fromkeys(self._targets.experts.values()):
            gate, up, down = module.stacks
            if not tensors.keys().isdisjoint((gate, up)):
                parts[module, "gate_up"] = [
                    tensors[stem] if stem in tensors else self._stack(module, stem)
                    for stem in (gate, up)
                ]
            if down in tensors:
                parts[module, "down"] = tensors[down]

    def _stack(self, module: MixtureOfExperts, stem: str) -> PackedTensor:
        """A stack as it was loaded, on its own: it may share a tensor with another."""
        weight, first, step = self._targets.stack(stem)
        count, outputs, inputs = self._targets.shapes[stem]
        if step == outputs:
            return weight
        blocks = weight.format.unpack(weight.planes).unflatten(0, (count, step))
        data = blocks[:, first : first + outputs].reshape(-1)
        return PackedTensor.from_bytes(weight.type_name, data, (count * outputs, inputs))

    def _rebuild(
        self,
        products: Sequence[QuantLinear],
        tensors: Mapping[str, PackedTensor],
        merges: Sequence[Merge],
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
            rebuilt += [self._run(product, list(stems), tensors, merges) for _, stems in runs]
        return rebuilt

    def _run(
        self,
        product: QuantLinear,
        stems: list[str],
        tensors: Mapping[str, PackedTensor],
        merges: Sequence[Merge],
    ) -> QuantLinear:
        """A product of neighbouring parts that have one format."""
        start = self._targets.places[stems[0]].start
        parts = {stem: product.parts[stem] for stem in stems}
        stop = start + sum(parts.values())
        if stems[0] in tensors:
            weight = _below_each_other([tensors[stem] for stem in stems])
        else:
            weight = self._weights[product].rows(start, stop)
        bias = self._bias(product, parts, start, merges)
        return QuantLinear(weight, bias, parts=parts, numerics=product.numerics)

    def _bias(
        self, product: QuantLinear, parts: Mapping[str, int], start: int, merges: Sequence[Merge]
    ) -> Tensor | None:
        original = self._original.get((product, "bias"), product.bias)
        if original is None:
            return None
        biases = []
        for stem, rows in parts.items():
            biases.append(merged_bias(stem, original[start : start + rows], merges))
            start += rows
        return torch.cat(biases)


def _below_each_other(tensors: list[PackedTensor]) -> PackedTensor:
    """Matrices of one format as one."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    blocks = [t.format.unpack(t.planes).flatten() for t in tensors]
    rows = sum(tensor.shape[0] for tensor in tensors)
    return PackedTensor.from_bytes(first.type_name, torch.cat(blocks), (rows, first.shape[1]))
