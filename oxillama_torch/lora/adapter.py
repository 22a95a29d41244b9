"""An adapter as it was read: what it does to which tensor of the model, on the CPU.

N outputs, K inputs, r rank, E experts.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oxillama_torch.errors import RequestError
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.invalid import invalid_adapter
from oxillama_torch.lora.terms import LoraTerm, Replacement, Term

__all__ = ["Adapter", "read_adapter"]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A named set of terms.

    Args:
        name: how requests call it.
        terms: name of the model's tensor, such as ``blk.0.attn_q`` -> term.
        path: where it was read; None: it was made here.

    Attributes:
        digest: of the content: adapters with equal digests compute the same.
    """

    name: str
    terms: Mapping[str, Term]
    path: Path | None
    digest: str

    @classmethod
    def build(
        cls, name: str, terms: Mapping[str, Term], targets: BaseWeights, path: Path | None = None
    ) -> Adapter:
        """Check terms against a model and make an adapter of them.

        Raises:
            RequestError: a term has no place in the model or does not fit there, or the name is
                empty or not printable.
        """
        if not name or name != name.strip() or not name.isprintable():
            raise RequestError(f"an adapter cannot be called {name!r}", param="name")
        if not terms:
            raise invalid_adapter(name, "it changes no layer of this model")
        for stem, term in terms.items():
            _check(name, stem, term, targets)
        return cls(name, dict(sorted(terms.items())), path, _digest(terms))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for term in self.terms.values() for t in term.tensors())

    @property
    def ranks(self) -> list[int]:
        """The different ranks of its terms, ascending."""
        return sorted({term.rank for term in self._low_rank().values()})

    @property
    def uses_dora(self) -> bool:
        return any(term.magnitude is not None for term in self._low_rank().values())

    @property
    def replaced(self) -> list[str]:
        """Tensors that it has whole, in the place of the model's."""
        return [stem for stem, term in self.terms.items() if isinstance(term, Replacement)]

    def _low_rank(self) -> dict[str, LoraTerm]:
        return {stem: term for stem, term in self.terms.items() if isinstance(term, LoraTerm)}


def read_adapter(name: str, path: str | os.PathLike[str], targets: BaseWeights) -> Adapter:
    """Read a peft folder or an adapter GGUF for a model.

    Args:
        name: how requests will call it; not empty.
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a file.

    Raises:
        RequestError: there is no adapter, or it does not fit the model; names the tensor.
        UnsupportedError: a method or an option that this build does not do.
        GGUFError: the file is malformed.
    """
    from oxillama_torch.lora.adapter_gguf import read_gguf_terms
    from oxillama_torch.lora.peft_folder import read_peft_terms

    path = Path(path)
    if not path.exists():
        raise invalid_adapter(name, f"there is nothing at {path}")
    read = read_peft_terms if path.is_dir() else read_gguf_terms
    return Adapter.build(name, read(name, path, targets), targets, path)


def _check(name: str, stem: str, term: Term, targets: BaseWeights) -> None:
    if stem not in targets.shapes:
        raise invalid_adapter(name, f"the model has no tensor {stem!r} that adapters change")
    shape = targets.shapes[stem]
    if isinstance(term, Replacement):
        wanted = {"weight": (term.weight, shape)}
        if term.bias is not None:
            if stem not in targets.biased:
                raise invalid_adapter(name, f"{stem} has a bias, the model's has none")
            wanted["bias"] = (term.bias, shape[:-1])
    else:
        if len(shape) == 1:
            raise invalid_adapter(name, f"a low-rank change of {stem}, which is a vector")
        wanted = _factors(stem, term, targets)
    for part, (tensor, fit) in wanted.items():
        if tuple(tensor.shape) != fit:
            got = f"{part} of {stem} is {tuple(tensor.shape)}"
            raise invalid_adapter(name, f"{got}, the model's {shape} wants {fit}")
        if not bool(torch.isfinite(tensor).all()):
            raise invalid_adapter(name, f"{part} of {stem} has values that are not finite")
    if isinstance(term, LoraTerm) and (term.rank == 0 or not math.isfinite(term.scaling)):
        raise invalid_adapter(name, f"{stem} has rank {term.rank} and scaling {term.scaling}")


def _factors(
    stem: str, term: LoraTerm, targets: BaseWeights
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The factors of a term and the shapes that the model wants of them."""
    *stack, outputs, inputs = targets.shapes[stem]
    wanted = {
        "lora_A": (term.lora_A, (*stack, term.rank, inputs)),
        "lora_B": (term.lora_B, (*stack, outputs, term.rank)),
    }
    if term.magnitude is not None:
        lengths = inputs if targets.kind(stem) == "embedding" else outputs
        wanted["magnitude"] = (term.magnitude, (lengths,))
    return wanted


def _digest(terms: Mapping[str, Term]) -> str:
    digest = hashlib.sha256()
    for stem, term in sorted(terms.items()):
        shapes = [tuple(tensor.shape) for tensor in term.tensors()]
        kind = repr(term.scaling) if isinstance(term, LoraTerm) else "whole"
        digest.update(f"{stem} {kind} {shapes} ".encode())
        for tensor in term.tensors():
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
