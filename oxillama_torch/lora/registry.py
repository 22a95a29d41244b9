"""The adapters that requests may name. Any thread may load, replace, drop and look up.

A request keeps the version it was given: replacing or dropping an adapter takes its name away, and
its factors go when the last request that uses them has ended; a step later, if it stood in a line.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from oxillama_torch.errors import CapacityError, RequestError
from oxillama_torch.kernels.lora.op import FactorTable
from oxillama_torch.lora.adapter import Adapter, read_adapter
from oxillama_torch.lora.attach import factor_table, table_bytes
from oxillama_torch.lora.targets import Targets

__all__ = ["AdapterFacts", "AdapterRegistry", "LoadedAdapter"]


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is known of an adapter, on the device or put away.

    Args:
        name: how requests call it.
        digest: of its content.
        ranks: of its low-rank changes, ascending.
        nbytes: on the device, when it is there.
        pinned: it is never put away.
        resident: it is on the device now.
    """

    name: str
    digest: str
    ranks: tuple[int, ...]
    nbytes: int
    pinned: bool
    resident: bool


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """One version of an adapter, ready for use.

    Args:
        adapter: as it was read.
        table: its factors on the device.
    """

    adapter: Adapter
    table: FactorTable

    @property
    def digest(self) -> str:
        return self.adapter.digest

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return table_bytes(self.table)

    def facts(self, pinned: bool) -> AdapterFacts:
        """What there is to know of it."""
        ranks = tuple(self.adapter.ranks)
        return AdapterFacts(self.adapter.name, self.digest, ranks, self.nbytes, pinned, True)


class _Entry:
    """A name: ``loaded`` is None while the adapter is put away."""

    def __init__(self, loaded: LoadedAdapter, pinned: bool) -> None:
        self.loaded: LoadedAdapter | None = loaded
        self.path = loaded.adapter.path
        self.pinned = pinned or self.path is None
        self.facts = loaded.facts(self.pinned)


class AdapterRegistry:
    """Adapters of one model by name.

    Args:
        targets: the model's layers.
        budget_bytes: for factors on the device; beyond it those used longest ago are put away and
            read again from their files when a request names them. None: no limit.
    """

    def __init__(self, targets: Targets, *, budget_bytes: int | None = None) -> None:
        self.targets = targets
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # used longest ago first

    def load(
        self, name: str, path: str | os.PathLike[str], *, pinned: bool = False
    ) -> LoadedAdapter:
        """Read an adapter and give it a name, its own or that of another, which it replaces.

        Args:
            name: how requests call it.
            path: a peft folder or an adapter GGUF.
            pinned: never put it away.

        Raises:
            RequestError, UnsupportedError, GGUFError: as ``read_adapter``.
            CapacityError: it does not fit into the budget.
        """
        return self.add(read_adapter(name, path, self.targets), pinned=pinned)

    def add(self, adapter: Adapter, *, pinned: bool = False) -> LoadedAdapter:
        """Take in an adapter that has been read; one without a path is never put away."""
        while True:
            targets = self.targets
            loaded = LoadedAdapter(adapter, factor_table(adapter, targets))
            # Magnitudes are those of other weights if ``rebase`` has come in between.
            if self._insert(_Entry(loaded, pinned), targets):
                return loaded

    def drop(self, name: str) -> None:
        """Forget a name; requests under way are not touched.

        Raises:
            RequestError: there is no such adapter.
        """
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    def rebase(self, targets: Targets) -> None:
        """Forget every adapter: the model's weights are others now, in the same layers."""
        assert targets.numbers == self.targets.numbers, "steps know the layers by their numbers"
        with self._lock:
            self._entries.clear()
            self.targets = targets

    def names(self) -> list[str]:
        """Every adapter a request may name, in alphabetical order."""
        with self._lock:
            return sorted(self._entries)

    def facts(self) -> list[AdapterFacts]:
        """What is known of every adapter, in alphabetical order; none is read or used for this."""
        with self._lock:
            entries = [entry for _, entry in sorted(self._entries.items())]
            return [replace(e.facts, resident=e.loaded is not None) for e in entries]

    def get(self, name: str) -> LoadedAdapter:
        """The adapter called ``name``, read again if it was put away.

        Raises:
            RequestError: there is none; names those there are.
            RequestError, UnsupportedError, GGUFError: its files are no longer what they were.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            self._entries.move_to_end(name)
            if entry.loaded is not None:
                return entry.loaded
        adapter = read_adapter(name, entry.path, self.targets)
        if adapter.digest != entry.facts.digest:
            raise RequestError(
                f"the files of adapter {name!r} have changed since it was loaded: load it again",
                code="adapter_changed",
                param="adapters",
            )
        targets = self.targets
        loaded = LoadedAdapter(adapter, factor_table(adapter, targets))
        self._insert(_Entry(loaded, entry.pinned), targets, replacing=entry)
        return loaded

    def resolve(
        self, adapters: Sequence[tuple[str, float]]
    ) -> tuple[tuple[LoadedAdapter, float], ...]:
        """The versions a request will use from its first token to its last.

        An adapter at scale 0 changes nothing and is left out.
        """
        return tuple((self.get(name), float(scale)) for name, scale in adapters if scale)

    def _insert(self, entry: _Entry, targets: Targets, replacing: _Entry | None = None) -> bool:
        """Put an entry in if ``targets``, which it was made for, and ``replacing`` are still there.

        Returns: whether it was put in.
        """
        name = entry.loaded.adapter.name
        with self._lock:
            if targets is not self.targets:
                return False
            if replacing is not None and self._entries.get(name) is not replacing:
                return False
            others = {key: value for key, value in self._entries.items() if key != name}
            self._make_room(name, entry.loaded.nbytes, others)
            self._entries[name] = entry
            self._entries.move_to_end(name)
            return True

    def _make_room(self, name: str, nbytes: int, others: dict[str, _Entry]) -> None:
        if self._budget is None:
            return
        held = [entry for entry in others.values() if entry.loaded is not None]
        fixed = nbytes + sum(entry.loaded.nbytes for entry in held if entry.pinned)
        if fixed > self._budget:
            raise CapacityError(
                f"adapter {name!r} and the pinned ones take {fixed} bytes, there are {self._budget}"
            )
        total = nbytes + sum(entry.loaded.nbytes for entry in held)
        for entry in held:
            if total <= self._budget:
                return
            if not entry.pinned:
                total -= entry.loaded.nbytes
                entry.loaded = None

    def _unknown(self, name: str) -> RequestError:
        known = ", ".join(sorted(self._entries)) or "none"
        return RequestError(
            f"adapter {name!r} is not loaded; loaded: {known}",
            status=404,
            code="adapter_not_found",
            param="adapters",
        )
