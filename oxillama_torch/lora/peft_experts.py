"""Changes of experts in peft folders: one for a fused parameter, or one for each expert.

transformers 5 holds the experts of a layer as two parameters, ``gate_up_proj`` [E, 2N, K] and
``down_proj`` [E, K, N]; peft's ``target_parameters`` adapt them. Older adapters name each expert.

E experts, N outputs, K inputs, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.invalid import invalid_adapter
from oxillama_torch.lora.terms import LoraTerm

__all__ = ["ExpertReader"]

_FUSED = re.compile(r"(.*\.experts)((?:\.base_layer)*)")
_SINGLE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")

#: (module, rank) -> factor of a product.
Scaling = Callable[[str, int], float]


class ExpertReader:
    """Collects what a folder says about experts.

    Args:
        name: of the adapter, for errors.
        targets: the model's tensors.
        scaling: the configuration's.
    """

    def __init__(self, name: str, targets: BaseWeights, scaling: Scaling) -> None:
        self._name, self._targets, self._scaling = name, targets, scaling
        self._terms: dict[str, LoraTerm] = {}
        self._single: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    def takes(self, module: str, parts: dict[str, Tensor]) -> bool:
        """Keep what belongs to experts. Returns: whether it does."""
        fused, single = _FUSED.fullmatch(module), _SINGLE.fullmatch(module)
        if fused is None and single is None:
            return False
        if parts.keys() != {"lora_A", "lora_B"}:
            what = ", ".join(sorted(parts.keys() - {"lora_A", "lora_B"})) or "half a product"
            raise UnsupportedError(f"adapter {self._name!r}: {what} of {module}")
        if fused is not None:
            self._take_fused(fused[1], parts["lora_A"], parts["lora_B"])
        else:
            self._take_single(single, module, parts["lora_A"], parts["lora_B"])
        return True

    def terms(self) -> dict[str, LoraTerm]:
        """By stack of the model; experts that were not named are not changed."""
        for stem, products in self._single.items():
            count, outputs, inputs = self._targets.shapes[stem]
            rank = max(a.shape[0] for a, _ in products.values())
            lora_A, lora_B = torch.zeros(count, rank, inputs), torch.zeros(count, outputs, rank)
            for expert, (a, b) in products.items():
                lora_A[expert, : a.shape[0]], lora_B[expert, :, : a.shape[0]] = a, b
            self._terms[stem] = LoraTerm(lora_A, lora_B, 1.0)
        return self._terms

    def _take_fused(self, path: str, a: Tensor, b: Tensor) -> None:
        """Which parameter it is, peft leaves to the order of its wrappers: the shape tells."""
        gate, up, down = (self._stem(f"{path}.{part}_proj") for part in ("gate", "up", "down"))
        count, inner, hidden = self._targets.shapes[gate]
        if a.shape[0] % count or b.shape[1] != a.shape[0]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise invalid_adapter(self._name, f"{path}: {shapes} for {count} experts")
        lora_A = a.unflatten(0, (count, -1))
        lora_B = b.unflatten(1, (-1, count)).permute(2, 0, 1).contiguous()
        rank = lora_A.shape[1]
        if (lora_B.shape[1], a.shape[1]) == (2 * inner, hidden):
            scaling = self._scaling(f"{path}.gate_up_proj", rank)
            for stem, rows in ((gate, slice(inner)), (up, slice(inner, None))):
                self._terms[stem] = LoraTerm(lora_A, lora_B[:, rows].contiguous(), scaling)
        elif (lora_B.shape[1], a.shape[1]) == (hidden, inner):
            scaling = self._scaling(f"{path}.down_proj", rank)
            self._terms[down] = LoraTerm(lora_A, lora_B, scaling)
        else:
            got = f"a change of ({lora_B.shape[1]}, {a.shape[1]}) for each expert"
            known = f"{(2 * inner, hidden)} and {(hidden, inner)}"
            raise invalid_adapter(self._name, f"{path}: {got}, the model's are {known}")

    def _take_single(self, match: re.Match, module: str, a: Tensor, b: Tensor) -> None:
        stem, expert = self._stem(f"{match[1]}.{match[3]}"), int(match[2])
        count, outputs, inputs = self._targets.shapes[stem]
        if expert >= count:
            raise invalid_adapter(self._name, f"{module}: the model has {count} experts")
        if (b.shape[0], a.shape[1]) != (outputs, inputs) or a.shape[0] != b.shape[1]:
            got = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise invalid_adapter(self._name, f"{module}: {got}, the model's ({outputs}, {inputs})")
        # each may have a scaling of its own: it goes into B
        product = (a, b * self._scaling(module, a.shape[0]))
        self._single.setdefault(stem, {})[expert] = product

    def _stem(self, module: str) -> str:
        stem = self._targets.stem(module)
        if stem is None:
            raise invalid_adapter(self._name, f"the model has no experts {module!r}")
        return stem
