"""Adapters written as peft saves them, for peft to load.

r rank, E experts, N outputs, K inputs.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.peft_tensors import PREFIX, WEIGHTS
from oxillama_torch.lora.terms import LoraTerm, Replacement
from oxillama_torch.lora.write_gguf import alpha_of

__all__ = ["write_peft_folder"]


def write_peft_folder(adapter: Adapter, folder: str | os.PathLike[str], base: BaseWeights) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: with low-rank changes only.
        folder: made if it is not there.
        base: the model it was read for.

    Raises:
        UnsupportedError: the adapter has magnitudes or tensors of its own, or changes something
            for which HuggingFace's model has no module of that name.
    """
    from safetensors.torch import save_file

    base.check_names()
    writer = _Writer(base)
    for stem, term in adapter.terms.items():
        if isinstance(term, Replacement) or term.magnitude is not None:
            what = "whole" if isinstance(term, Replacement) else "with a magnitude"
            raise UnsupportedError(f"writing {stem} {what}", ("low-rank changes",))
        if base.kind(stem) != "experts":
            writer.add_matrix(stem, term)
    writer.add_experts({s: t for s, t in adapter.terms.items() if base.kind(s) == "experts"})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(writer.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    writer.config().save_pretrained(str(folder))


class _Writer:
    """Collects tensors and what the configuration has to say of them.

    Attributes:
        tensors: by key of the file.
    """

    def __init__(self, base: BaseWeights) -> None:
        self._base = base
        self.tensors: dict[str, Tensor] = {}
        self._modules: dict[str, tuple[int, float]] = {}  # path -> (rank, alpha)
        self._parameters: dict[str, tuple[int, float]] = {}

    def add_matrix(self, stem: str, term: LoraTerm) -> None:
        """A linear layer, or the embedding, whose change peft holds transposed."""
        module = self._base.module(stem)
        self._modules[module] = (term.rank, alpha_of(term))
        if self._base.kind(stem) == "embedding":
            self._keep(f"{module}.lora_embedding_A", term.lora_B.T)
            self._keep(f"{module}.lora_embedding_B", term.lora_A.T)
        else:
            self._keep(f"{module}.lora_A.weight", term.lora_A)
            self._keep(f"{module}.lora_B.weight", self._base.model_rows(stem, term.lora_B))

    def add_experts(self, terms: dict[str, LoraTerm]) -> None:
        """Stacks, as the parameters into which transformers 5 puts them."""
        layers: dict[str, dict[str, LoraTerm]] = defaultdict(dict)
        for stem, term in terms.items():
            prefix, _, name = stem.rpartition(".")
            layers[prefix][name.split("_")[1]] = term
        for prefix, parts in layers.items():
            path = self._base.module(f"{prefix}.ffn_up_exps").rpartition(".")[0]
            outer = ""
            if "down" in parts:
                self._parameter(path, "down_proj", outer, parts["down"])
                outer = ".base_layer"  # peft puts one wrapper around the other, down outermost
            if "gate" in parts or "up" in parts:
                both = self._gate_up(prefix, parts.get("gate"), parts.get("up"))
                self._parameter(path, "gate_up_proj", outer, both)

    def _parameter(self, path: str, name: str, outer: str, term: LoraTerm) -> None:
        self._parameters[f"{path}.{name}"] = (term.rank, alpha_of(term))
        self._keep(f"{path}{outer}.lora_A.weight", term.lora_A.flatten(0, 1))
        self._keep(f"{path}{outer}.lora_B.weight", term.lora_B.permute(1, 2, 0).flatten(1))

    def _gate_up(self, prefix: str, gate: LoraTerm | None, up: LoraTerm | None) -> LoraTerm:
        """One change of both: with the factor A that they share, or with both below each other."""
        count, outputs, _ = self._base.shapes[f"{prefix}.ffn_up_exps"]
        known = gate or up
        shared = gate is None or up is None or torch.equal(gate.lora_A, up.lora_A)
        if shared and (gate is None or up is None or gate.scaling == up.scaling):
            nothing = torch.zeros(count, outputs, known.rank)
            halves = [nothing if half is None else half.lora_B for half in (gate, up)]
            return LoraTerm(known.lora_A, torch.cat(halves, dim=1), known.scaling)
        lora_B = torch.zeros(count, 2 * outputs, gate.rank + up.rank)
        lora_B[:, :outputs, : gate.rank] = gate.lora_B * gate.scaling
        lora_B[:, outputs:, gate.rank :] = up.lora_B * up.scaling
        return LoraTerm(torch.cat([gate.lora_A, up.lora_A], dim=1), lora_B, 1.0)

    def _keep(self, key: str, values: Tensor) -> None:
        self.tensors[PREFIX + key] = values.contiguous().clone()

    def config(self) -> Any:
        """peft's configuration: the most frequent rank and alpha, and patterns for the others."""
        import peft

        sizes = self._modules | self._parameters
        [((rank, alpha), _)] = Counter(sizes.values()).most_common(1)
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=_plain(alpha),
            target_modules=self._short(self._modules),
            target_parameters=self._short(self._parameters) or None,
            rank_pattern={path: r for path, (r, _) in sizes.items() if r != rank},
            alpha_pattern={path: _plain(a) for path, (_, a) in sizes.items() if a != alpha},
            inference_mode=True,
        )

    def _short(self, paths: Iterable[str]) -> list[str]:
        """Names without the layer's number where every layer has them, else whole paths."""
        by_name = defaultdict(list)
        for path in paths:
            by_name[path.split(".", 3)[-1] if ".layers." in path else path].append(path)
        count = self._base.config.num_layers
        names = []
        for name, members in by_name.items():
            everywhere = len(members) == count or ".layers." not in members[0]
            names += [name] if everywhere else members
        return sorted(names)


def _plain(alpha: float) -> float:
    """Whole numbers as peft writes them."""
    return int(alpha) if alpha.is_integer() else alpha
