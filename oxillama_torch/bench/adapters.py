"""Random adapters on every linear layer of a loaded model, to measure what they cost."""

from __future__ import annotations

import torch

from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.registry import AdapterRegistry
from oxillama_torch.lora.terms import LoraTerm

__all__ = ["add_random_adapters"]


def add_random_adapters(registry: AdapterRegistry, count: int, rank: int) -> list[str]:
    """Load adapters on all linear layers but the head.

    Args:
        registry: of the engine.
        count, rank: of the adapters.

    Returns: their names.
    """
    targets = registry.targets
    stems = [stem for stem in targets.places if stem.startswith("blk.")]
    names = [f"random-{index}" for index in range(count)]
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(index)
        terms = {}
        for stem in stems:
            outputs, inputs = targets.shapes[stem]
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            # small: what is measured is time, and the model's own tokens are as good as any
            b = torch.randn(outputs, rank, generator=generator) * 1e-3
            terms[stem] = LoraTerm(a, b, 1.0)
        registry.add(Adapter.build(name, terms, targets))
    return names
