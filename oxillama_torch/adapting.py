"""The adapters of an open model: loaded beside it, combined, merged into its weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from oxillama_torch.engine.merging import AdapterMerging
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import RequestError
from oxillama_torch.lora.combine import combine

__all__ = ["AdapterChoice", "Adapting"]

#: An adapter's name, or names with scales.
AdapterChoice = str | Sequence[tuple[str, float]] | None


class Adapting:
    """Adapters of one engine.

    Args:
        engine: the batching thread.

    Attributes:
        merging: which adapters are part of the weights.
    """

    def __init__(self, engine: EngineThread) -> None:
        self._registry = engine.adapters
        self.merging = AdapterMerging(engine)
        self._off = False

    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return self._registry.names()

    def pairs(self, adapters: AdapterChoice) -> tuple[tuple[str, float], ...]:
        """What a request carries for a choice: (name, scale) pairs; none while disabled."""
        if adapters is None or self._off:
            return ()
        return ((adapters, 1.0),) if isinstance(adapters, str) else tuple(map(tuple, adapters))

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load a peft folder or an adapter GGUF."""
        self._registry.load(name, path)

    def unload(self, name: str) -> None:
        """Forget an adapter that is not merged."""
        if name in self.merging.merged:
            raise RequestError(f"adapter {name!r} is merged: unmerge it first", param="name")
        self._registry.drop(name)

    def combine(
        self, names: Sequence[str], weights: Sequence[float], new_name: str, **options: Any
    ) -> None:
        """Make a new adapter out of loaded ones; options as ``lora.combine``."""
        parts = [self._registry.get(name).adapter for name in names]
        self._registry.add(combine(new_name, parts, weights, self._registry.targets, **options))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """For the duration of a block, the model is the bare one, merged adapters included."""
        with self.merging.disabled():
            self._off = True
            try:
                yield
            finally:
                self._off = False
