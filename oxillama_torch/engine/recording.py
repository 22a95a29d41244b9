"""All graphs of an engine: recorded at the start, dropped when what they hold has changed."""

from __future__ import annotations

from collections.abc import Callable

from oxillama_torch.engine.prefill_graphs import PrefillGraphs
from oxillama_torch.engine.run_ahead import LineRunner

__all__ = ["Recording"]


class Recording:
    """Graphs of both kinds.

    Args:
        lines: has those of decode steps;  prefill: those of short prompts. None: there are none.
    """

    def __init__(self, lines: LineRunner | None, prefill: PrefillGraphs | None) -> None:
        self._prefill = prefill
        kinds = (None if lines is None else lines.graphs, prefill)
        self._kinds = [kind for kind in kinds if kind is not None]

    def __len__(self) -> int:
        return sum(map(len, self._kinds))

    @property
    def prompts(self) -> int:
        """Steps with a short prompt that were replayed since the start."""
        return 0 if self._prefill is None else self._prefill.steps

    def capture_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make what is wanted of every kind at the start; the rest is made when it is first wanted.

        Args:
            progress: called with (graphs made, graphs in all).
        """
        plan = [(kind, shape) for kind in self._kinds for shape in kind.shapes()]
        for number, (kind, shape) in enumerate(plan):
            kind.capture(shape)
            if progress is not None:
                progress(number + 1, len(plan))

    def drop(self) -> None:
        """Forget all of them: weights or kernels are others now."""
        for kind in self._kinds:
            kind.drop()
