"""Merging adapters into the weights of a running engine, between two steps.

Merged tensors are computed in the caller's thread while the engine goes on, and what kernels want
to do with them once is done there too; the batching thread only exchanges them and empties the
prefix cache, whose keys and values belong to other weights. Requests that are running go on with
the new weights from their next token.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence

from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.loading import prepare_kernels, weights_of
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import RequestError
from oxillama_torch.lora.merge import MERGE_DTYPES, Merge, Merger, MergeReport
from oxillama_torch.lora.targets import Targets

__all__ = ["MERGE_DTYPES", "AdapterMerging"]


class AdapterMerging:
    """Which adapters are part of an engine's weights. Any thread may call its methods.

    Args:
        engine: a running engine; nothing may be merged into its model yet.
    """

    def __init__(self, engine: EngineThread) -> None:
        assert engine.adapters is not None, "an engine without adapters"
        self._engine = engine
        self._merger = Merger(engine.adapters.targets)
        self._lock = threading.RLock()
        self._merges: dict[str, Merge] = {}
        self._for_good = ""  # mark of what was merged and unloaded
        self._disabled = False

    @property
    def merged(self) -> dict[str, float]:
        """Name -> scale of the adapters that are part of the weights, in order of merging."""
        return {name: merge.scale for name, merge in self._merges.items()}

    @property
    def mark(self) -> str:
        """Tells weights with different adapters in them apart; empty for the file's own."""
        parts = [f"{m.adapter.digest} {m.scale!r} {m.dtype}" for m in self._merges.values()]
        if not parts:
            return self._for_good
        return f"-{hashlib.sha256(repr([self._for_good, *parts]).encode()).hexdigest()[:8]}"

    def merge(self, name: str, scale: float = 1.0, dtype: str = "f16") -> MergeReport:
        """Make ``W + scale * (what the adapter changes)`` the weights of every request.

        Args:
            name: a loaded adapter.
            scale: finite.
            dtype: what the touched tensors are kept as, one of MERGE_DTYPES; ``same``: as the type
                they had where that can be encoded, else as ``f16``.

        Raises:
            RequestError: it is not loaded, or merged already.
            UnsupportedError: the dtype is unknown or cannot hold a weight.
        """
        with self._lock:
            self._check_enabled()
            return self._apply({**self._merges, name: self._new(name, scale, dtype)})

    def unmerge(self, name: str) -> None:
        """Take an adapter out again; layers that no other one touches get their old bytes back.

        Raises:
            RequestError: it is not merged.
        """
        with self._lock:
            self._check_enabled()
            if name not in self._merges:
                raise RequestError(f"adapter {name!r} is not merged", param="name")
            self._apply({key: merge for key, merge in self._merges.items() if key != name})

    def merge_and_unload(
        self, adapters: Sequence[tuple[str, float]] = (), dtype: str = "f16"
    ) -> MergeReport:
        """Merge for good, beside what is merged already, and forget every adapter.

        The weights that were there before are gone, as in peft; adapters loaded from now on change
        those that are there now. Requests under way keep what they began with.

        Args:
            adapters: loaded ones that are not merged yet, with scales.

        Raises:
            RequestError: nothing is named or merged; otherwise as ``merge``.
        """
        with self._lock:
            self._check_enabled()
            merges = dict(self._merges)
            for name, scale in adapters:
                merges[name] = self._new(name, scale, dtype)
            if not merges:
                raise RequestError("no adapter is named, and none is merged", param="adapters")
            report = self._apply(merges)
            registry = self._engine.adapters
            self._engine.call(lambda engine: registry.rebase(Targets(registry.targets.decoder)))
            self._for_good = self.mark
            self._merger, self._merges = Merger(registry.targets), {}
            return report

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """For the duration of a block, the weights are the file's; other threads' merges wait."""
        with self._lock:
            self._check_enabled()
            before = self._merges
            self._apply({})
            self._disabled = True
            try:
                yield
            finally:
                self._disabled = False
                self._apply(before)

    def _new(self, name: str, scale: float, dtype: str) -> Merge:
        if not math.isfinite(scale):
            raise RequestError(f"the scale of adapter {name!r} is {scale}", param="scale")
        if name in self._merges:
            raise RequestError(f"adapter {name!r} is merged already", param="name")
        return Merge(self._engine.adapters.get(name).adapter, scale, dtype)

    def _check_enabled(self) -> None:
        if self._disabled:
            raise RequestError("adapters are disabled in this block", param="name")

    def _apply(self, merges: Mapping[str, Merge]) -> MergeReport:
        parts, report = self._merger.prepare(list(merges.values()))
        # Now, in this thread: kernels made ready at their first use would hold everybody up.
        model = self._engine.adapters.targets.decoder
        known = set(weights_of(model))
        prepare_kernels(model, [w for w in self._merger.weights(parts) if w not in known])

        def swap(engine: Engine) -> None:
            self._merger.swap(parts)
            engine.forget_prefixes()

        self._engine.call(swap)
        self._merges = dict(merges)
        return report
