"""An adapter as it was read: low-rank factors by tensor of the model, on the CPU.

N outputs, K inputs, r rank.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oxillama_torch.errors import RequestError
from oxillama_torch.lora.targets import Targets

__all__ = ["Adapter", "LoraTerm", "invalid_adapter", "read_adapter"]


@dataclass(frozen=True, slots=True, eq=False)
class LoraTerm:
    """What an adapter does to one weight: ``W + scaling * B A``.

    With a magnitude m (DoRA, Liu et al. 2024), each row is then scaled to length m.

    Args:
        lora_A: float32 [r, K].
        lora_B: float32 [N, r], rows in the order of the file's weight.
        scaling: factor of the product.
        magnitude: float32 [N] or None.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def tensors(self) -> list[Tensor]:
        """All tensors of the term."""
        return [self.lora_A, self.lora_B, *([] if self.magnitude is None else [self.magnitude])]

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """``scaling * B A`` for some rows, float32 [n, K]."""
        return self.scaling * (self.lora_B[rows] @ self.lora_A)


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
    terms: Mapping[str, LoraTerm]
    path: Path | None
    digest: str

    @classmethod
    def build(
        cls, name: str, terms: Mapping[str, LoraTerm], targets: Targets, path: Path | None = None
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
        return sorted({term.rank for term in self.terms.values()})

    @property
    def uses_dora(self) -> bool:
        return any(term.magnitude is not None for term in self.terms.values())


def read_adapter(name: str, path: str | os.PathLike[str], targets: Targets) -> Adapter:
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


def invalid_adapter(name: str, why: str) -> RequestError:
    """The error for an adapter that this model cannot use."""
    return RequestError(f"adapter {name!r}: {why}", code="invalid_adapter", param="path")


def _check(name: str, stem: str, term: LoraTerm, targets: Targets) -> None:
    if stem not in targets.places:
        raise invalid_adapter(name, f"the model has no linear layer {stem!r}")
    outputs, inputs = targets.places[stem].weight.shape
    wanted = {
        "lora_A": (term.lora_A, (term.rank, inputs)),
        "lora_B": (term.lora_B, (outputs, term.rank)),
    }
    if term.magnitude is not None:
        wanted["magnitude"] = (term.magnitude, (outputs,))
    for part, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            got = f"{part} of {stem} is {tuple(tensor.shape)}"
            raise invalid_adapter(name, f"{got}, the model's ({outputs}, {inputs}) wants {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise invalid_adapter(name, f"{part} of {stem} has values that are not finite")
    if term.rank == 0:
        raise invalid_adapter(name, f"{stem} has rank 0")


def _digest(terms: Mapping[str, LoraTerm]) -> str:
    digest = hashlib.sha256()
    for stem, term in sorted(terms.items()):
        shapes = [tuple(tensor.shape) for tensor in term.tensors()]
        digest.update(f"{stem} {term.scaling!r} {shapes} ".encode())
        for tensor in term.tensors():
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
