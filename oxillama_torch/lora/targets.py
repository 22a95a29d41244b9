"""What adapters may change in a loaded model, and where it stands there.

N outputs, K inputs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.layers.moe import MixtureOfExperts
from oxillama_torch.layers.norm import RMSNorm
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.models.decoder import Decoder

__all__ = ["Place", "Targets"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a linear layer stands.

    Args:
        number: its line in tables of factors; layers of one product follow each other.
        owner: the module that holds the product: a group, or the product itself.
        linear: the product.
        start: its first row in the product.
        weight: (N, K) as it was loaded, whatever is merged later.
    """

    number: int
    owner: nn.Module
    linear: QuantLinear
    start: int
    weight: PackedTensor


class Targets(BaseWeights):
    """Embedding, linear layers, experts, norms and head of a decoder.

    Args:
        decoder: nothing may be merged into it yet.

    Attributes:
        places: name of a linear layer, such as ``blk.0.attn_q`` -> Place.
        numbers: the same names -> Place.number.
        norms: name -> module.
        experts: name of a stack, such as ``blk.0.ffn_up_exps`` -> module.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.dtype, self.device = decoder.dtype, decoder.device
        self.places: dict[str, Place] = {}
        self.norms: dict[str, RMSNorm] = {}
        self.experts: dict[str, MixtureOfExperts] = {}
        for owner in decoder.modules():
            if isinstance(owner, LinearGroup):
                for linear in owner.linears:
                    self._add(owner, linear)
        for module in decoder.modules():
            if isinstance(module, QuantLinear) and next(iter(module.parts)) not in self.places:
                self._add(module, module)
            elif isinstance(module, RMSNorm):
                self.norms[module.name] = module
            elif isinstance(module, MixtureOfExperts):
                self.experts |= dict.fromkeys(module.stacks, module)
        self.numbers = {stem: place.number for stem, place in self.places.items()}
        self._weights = {stem: place.weight for stem, place in self.places.items()}
        self._weights["token_embd"] = decoder.embedding.weight
        shapes = {stem: tuple(weight.shape) for stem, weight in self._weights.items()}
        shapes |= {stem: (len(norm.weight),) for stem, norm in self.norms.items()}
        shapes |= {stem: module.shape(stem) for stem, module in self.experts.items()}
        self._stacks = {stem: module.stack(stem) for stem, module in self.experts.items()}
        biased = [stem for stem, place in self.places.items() if place.linear.bias is not None]
        super().__init__(decoder.config, shapes, biased)

    def _add(self, owner: nn.Module, linear: QuantLinear) -> None:
        start = 0
        for stem, rows in linear.parts.items():
            weight = linear.weight.rows(start, start + rows)
            self.places[stem] = Place(len(self.places), owner, linear, start, weight)
            start += rows

    def rows(self, stem: str, start: int, stop: int) -> Tensor:
        if stem not in self._stacks:
            return self._weights[stem].rows(start, stop).dequantize()
        outputs = self.shapes[stem][1]
        weight, first, step = self._stacks[stem]
        expert, inside = divmod(start, outputs)
        begin = expert * step + first + inside
        return weight.rows(begin, begin + stop - start).dequantize()

    def stack(self, stem: str) -> tuple[PackedTensor, int, int]:
        """Where a stack of experts stands as it was loaded, see ``MixtureOfExperts.stack``."""
        return self._stacks[stem]

    def type_name(self, stem: str) -> str:
        """GGML type of a matrix or stack as it was loaded."""
        weight = self._weights[stem] if stem in self._weights else self._stacks[stem][0]
        return weight.type_name

    def nbytes(self, stem: str) -> int:
        """Bytes of a weight as it was loaded."""
        if stem in self._weights:
            return self._weights[stem].nbytes
        if stem in self.norms:
            return self.norms[stem].weight.nbytes
        weight, _, step = self._stacks[stem]
        return weight.nbytes * self.shapes[stem][1] // step
