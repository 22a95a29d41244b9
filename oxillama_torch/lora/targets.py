"""The linear layers of a model that adapters may change, by the names of their tensors.

N outputs, K inputs, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.models.decoder import Decoder

__all__ = ["Place", "Targets"]

# What a layer is called in a HuggingFace model, and in a GGUF file.
_STEMS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a layer stands.

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


class Targets:
    """Linear layers inside the decoder's layers; the embedding and the head are not among them.

    Args:
        decoder: nothing may be merged into it yet.

    Attributes:
        places: name of the tensor, such as ``blk.0.attn_q`` -> Place.
        numbers: the same names -> Place.number.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._config = decoder.config
        self.architecture = decoder.config.architecture.name
        self.dtype, self.device = decoder.dtype, decoder.device
        self.places: dict[str, Place] = {}
        for owner in decoder.layers.modules():
            if isinstance(owner, LinearGroup):
                for linear in owner.linears:
                    self._add(owner, linear)
        for module in decoder.layers.modules():
            if isinstance(module, QuantLinear) and next(iter(module.parts)) not in self.places:
                self._add(module, module)
        self.numbers = {stem: place.number for stem, place in self.places.items()}

    def _add(self, owner: nn.Module, linear: QuantLinear) -> None:
        start = 0
        for stem, rows in linear.parts.items():
            weight = linear.weight.rows(start, start + rows)
            self.places[stem] = Place(len(self.places), owner, linear, start, weight)
            start += rows

    def stem(self, module: str) -> str | None:
        """What a HuggingFace module such as ``model.layers.3.mlp.up_proj`` is called in the file.

        Returns: ``blk.3.ffn_up``; None when the model has no such layer.
        """
        _, _, rest = module.rpartition("layers.")
        layer, _, name = rest.partition(".")
        stem = f"blk.{layer}.{_STEMS.get(name)}"
        return stem if stem in self.places else None

    def file_rows(self, stem: str, values: Tensor) -> Tensor:
        """Rows [N, ...] of a HuggingFace weight in the order in which the file has them.

        Files whose rotation pairs neighbours hold the rows of each head of q and k interleaved:
        first half and second half by turns (``permute`` of llama.cpp's converter).
        """
        _, layer, name = stem.split(".")
        if self._config.architecture.rope_style != "norm" or name not in ("attn_q", "attn_k"):
            return values
        sizes = self._config.layers[int(layer)]
        heads = sizes.num_heads if name == "attn_q" else sizes.num_kv_heads
        halves = values.unflatten(0, (heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2).contiguous()

    def chunks(self, stem: str, rows: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """The weight as it was loaded, dequantized piece by piece: (rows, float32 [n, K])."""
        weight = self.places[stem].weight
        for start in range(0, weight.shape[0], rows):
            stop = min(start + rows, weight.shape[0])
            yield slice(start, stop), weight.rows(start, stop).dequantize()
