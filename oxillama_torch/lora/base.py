"""The tensors of a base model that adapters may change, by their names in the file.

N outputs, K inputs, E experts, H heads, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile
from oxillama_torch.kernels import formats
from oxillama_torch.models.config import ModelConfig

__all__ = ["BaseFile", "BaseWeights", "Kind"]

Kind = Literal["linear", "embedding", "experts", "norm"]

# What a module is called in a HuggingFace model, and in a GGUF file; in the order of the model.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_MODULES = {stem: module for module, stem in _LAYER.items()}
_ORDER = {stem: place for place, stem in enumerate(_LAYER.values())}
# Mixtral's names, from before transformers gave all models with experts the same ones.
_OLD_NAMES = {
    "block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
# Architectures whose HuggingFace models have these names, rows and norms: in others, converters
# may order rows otherwise or add one to norms, and an adapter would be silently wrong.
_KNOWN = frozenset({"llama", "qwen2", "qwen3", "qwen3moe", "granite"})
_PATH = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


class BaseWeights:
    """Shapes and names of what adapters may change; a tied head counts as a tensor of its own.

    Args:
        config: of the model.
        shapes: name of a tensor, such as ``blk.0.attn_q`` -> (N, K), (E, N, K) or (D,).
        biased: names of the linear layers that have a bias.

    Attributes:
        shapes: sorted in the order in which transformers has the modules.
        config, biased: as given.
    """

    def __init__(
        self,
        config: ModelConfig,
        shapes: Mapping[str, tuple[int, ...]],
        biased: Collection[str] = (),
    ) -> None:
        self.config, self.biased = config, frozenset(biased)
        self.architecture = config.architecture.name
        self.shapes = dict(sorted(shapes.items(), key=lambda item: _place(item[0])))

    def kind(self, stem: str) -> Kind:
        """What sort of tensor a name stands for."""
        if stem == "token_embd":
            return "embedding"
        return {1: "norm", 2: "linear", 3: "experts"}[len(self.shapes[stem])]

    def check_names(self) -> None:
        """Make sure that HuggingFace's names, rows and norms of this architecture are known.

        Raises:
            UnsupportedError: they are not.
        """
        if self.architecture not in _KNOWN:
            raise UnsupportedError(
                f"peft adapters for architecture {self.architecture!r}", sorted(_KNOWN)
            )

    def stem(self, module: str) -> str | None:
        """What a HuggingFace module such as ``model.layers.3.mlp.up_proj`` is called in the file.

        Experts are called by their stack, without a number.

        Returns: ``blk.3.ffn_up``; None when the model has nothing of that name.
        """
        path = ".".join(_OLD_NAMES.get(part, part) for part in module.split("."))
        if match := _PATH.fullmatch(path):
            stem = f"blk.{match[1]}.{_LAYER.get(match[2])}"
        else:
            stem = str(_TOP.get(path.rpartition(".")[2]))
        return stem if stem in self.shapes else None

    def module(self, stem: str) -> str:
        """The HuggingFace name: the inverse of ``stem``.

        Raises:
            UnsupportedError: this build does not know it.
        """
        for module, name in _TOP.items():
            if name == stem:
                return module if module == "lm_head" else f"model.{module}"
        _, layer, name = stem.split(".")
        if name not in _MODULES:
            raise UnsupportedError(f"the HuggingFace name of {stem}", _MODULES)
        return f"model.layers.{layer}.{_MODULES[name]}"

    def file_rows(self, stem: str, values: Tensor) -> Tensor:
        """Rows [N, ...] of a HuggingFace weight in the order in which the file has them.

        Files whose rotation pairs neighbours hold the rows of each head of q and k interleaved:
        first half and second half by turns (``permute`` of llama.cpp's converter).
        """
        heads = self._heads(stem)
        if heads is None:
            return values
        halves = values.unflatten(0, (heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2).contiguous()

    def model_rows(self, stem: str, values: Tensor) -> Tensor:
        """Rows [N, ...] of the file in the order of HuggingFace: the inverse of ``file_rows``."""
        heads = self._heads(stem)
        if heads is None:
            return values
        pairs = values.unflatten(0, (heads, -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2).contiguous()

    def chunks(self, stem: str, rows: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """The weight as the file has it, dequantized piece by piece: (rows, float32 [n, K]).

        A stack of experts counts as E * N rows; no piece holds rows of two of them.
        """
        *_, outputs, _ = self.shapes[stem]
        total = self.matrix_shape(stem)[0]
        for first in range(0, total, outputs):
            for start in range(first, first + outputs, rows):
                stop = min(start + rows, first + outputs)
                yield slice(start, stop), self.rows(stem, start, stop)

    def matrix_shape(self, stem: str) -> tuple[int, int]:
        """(N, K), or (E * N, K) for a stack."""
        *stack, outputs, inputs = self.shapes[stem]
        return (stack[0] if stack else 1) * outputs, inputs

    def rows(self, stem: str, start: int, stop: int) -> Tensor:
        """Rows of the weight as the file has it, float32 [n, K]."""
        raise AssertionError(f"{type(self).__name__} has no weights")

    def _heads(self, stem: str) -> int | None:
        """Heads whose rows the file interleaves; None: it does not."""
        name = stem.rpartition(".")[2]
        if self.config.architecture.rope_style != "norm" or name not in ("attn_q", "attn_k"):
            return None
        sizes = self.config.layers[int(stem.split(".")[1])]
        return sizes.num_heads if name == "attn_q" else sizes.num_kv_heads


class BaseFile(BaseWeights):
    """What adapters may change in a GGUF file that is not loaded as a model.

    Args:
        gguf: the open file.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        shapes = {}
        for name, info in gguf.tensors.items():
            stem, _, last = name.rpartition(".")
            if last == "weight" and (stem in _TOP.values() or stem.rpartition(".")[2] in _ORDER):
                shapes[stem] = tuple(info.shape)
        shapes.setdefault("output", shapes.get("token_embd", ()))
        biased = [stem for stem in shapes if f"{stem}.bias" in gguf.tensors]
        config = ModelConfig.from_metadata(Metadata(gguf.metadata, str(gguf.path)))
        super().__init__(config, shapes, biased)

    def tensor(self, stem: str) -> str:
        """Name of the tensor that holds a weight; of a tied head, that is the embedding."""
        name = f"{stem}.weight"
        return name if name in self.gguf.tensors else "token_embd.weight"

    def rows(self, stem: str, start: int, stop: int) -> Tensor:
        info = self.gguf.tensors[self.tensor(stem)]
        rows, inputs = self.matrix_shape(stem)
        size = info.nbytes // rows
        data = self.gguf.data(info.name)[start * size : stop * size]
        return formats.dequantize(info.type, data).view(stop - start, inputs)


def _place(stem: str) -> tuple[int, int]:
    """Where transformers has a module: the embedding, layer by layer, the norm and the head."""
    if not stem.startswith("blk."):
        return (-1 if stem == "token_embd" else 1 << 32, list(_TOP.values()).index(stem))
    _, layer, name = stem.split(".")
    return int(layer), _ORDER.get(name, len(_ORDER))
