"""Which tokens the grammars of a step's requests allow, found out while the model runs.

Shapes: R rows of logits, C of them constrained, V vocabulary, W 32-bit words of V bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint_matcher import Matcher

__all__ = ["MaskFiller", "Masks"]

# A step whose masks take longer than this is followed by some that compute them one by one, so that
# the request that is to blame is known and ended.
_SLOW_S = 0.05
_WATCHED_STEPS = 16


class MaskFiller:
    """Starts the masks of each step.

    Args:
        vocab_size: columns of the logits.
        device: where they are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._executor: LLExecutor | None = None
        self._watched = 0

    def start(self, matchers: Sequence[Matcher | None]) -> Masks | None:
        """Begin to compute the masks of a step.

        Args:
            matchers: one per row of logits; None: any token.

        Returns: None when no row is constrained.
        """
        rows = [(index, matcher) for index, matcher in enumerate(matchers) if matcher is not None]
        if not rows:
            return None
        if self._executor is None:
            self._executor = LLExecutor()
        self._watched = max(self._watched - 1, 0)
        return Masks(
            rows, self._vocab_size, self._device, self._executor, self._watched > 0, self._watch
        )

    def _watch(self) -> None:
        self._watched = _WATCHED_STEPS


class Masks:
    """The masks of one step in the making.

    Args:
        rows: (row of the logits, matcher) of those that are constrained.
        vocab_size: columns of the logits.
        device: where they are.
        executor: threads to compute with.
        one_by_one: take each request's time.
        watch: called when it took long.
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, Matcher]],
        vocab_size: int,
        device: torch.device,
        executor: LLExecutor,
        one_by_one: bool,
        watch: Callable[[], None],
    ) -> None:
        self._rows, self._vocab_size = rows, vocab_size
        self._one_by_one, self._watch = one_by_one, watch
        self._device, self._executor = device, executor
        self._banned: torch.Tensor | None = None
        # llguidance computes without the interpreter's lock. A thread of its own for each step
        # costs less than a tenth of a millisecond, and there is none to be stopped at the end.
        self._thread = threading.Thread(target=self._fill, name="oxillama-masks", daemon=True)
        self._thread.start()

    def apply(self, logits: torch.Tensor) -> tuple[torch.Tensor, dict[int, RequestError]]:
        """Logits with minus infinity for what is not allowed, and the rows that have no mask.

        Args:
            logits: float32 [R, V], left as it is.
        """
        self.wait()
        assert self._banned is not None, "llguidance refused what it was asked"
        errors = {row: error for row, matcher in self._rows if (error := matcher.error)}
        banned = self._banned.to(self._device, non_blocking=True)
        if len(self._rows) == len(logits):
            return logits.masked_fill(banned, -torch.inf), errors
        rows = torch.tensor([row for row, _ in self._rows], device=self._device)
        masked = logits.clone()
        masked[rows] = masked[rows].masked_fill_(banned, -torch.inf)
        return masked, errors

    def words(self) -> tuple[list[int], np.ndarray, dict[int, RequestError]]:
        """The masks as bits, for what applies them itself.

        Returns: rows that have one, their masks int32 [C, W] (a set bit: allowed), and the rows
            that have none, each with the reason.
        """
        self.wait()
        assert self._banned is not None, "llguidance refused what it was asked"
        errors = {row: error for row, matcher in self._rows if (error := matcher.error)}
        bits = np.packbits(~self._banned.numpy(), axis=1, bitorder="little")
        bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4)))
        return [row for row, _ in self._rows], bits.view(np.int32), errors

    def wait(self) -> None:
        """Let the filling end, if the masks are wanted or not: matchers serve one at a time."""
        self._thread.join()

    def _compute(self, pairs: list[tuple[LLMatcher, int]], words: np.ndarray) -> None:
        """Fill lines of ``words``; a single one in this thread, several in the executor's."""
        self._executor.unsafe_compute_mask_ptr(
            pairs, words.ctypes.data, words.shape[1] * words.itemsize, len(words)
        )

    def _fill(self) -> None:
        words = np.empty((len(self._rows), self._rows[0][1].words), np.int32)
        pairs = [(matcher.inner, index) for index, (_, matcher) in enumerate(self._rows)]
        started = time.monotonic()
        if self._one_by_one:
            for pair, (_, matcher) in zip(pairs, self._rows):
                with matcher.timed():
                    self._compute([pair], words)
        else:
            self._compute(pairs, words)
        if time.monotonic() - started > _SLOW_S:
            self._watch()
        # Columns beyond the last word have no token and come out as zeros.
        allowed = np.unpackbits(
            words.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little"
        )
        for row, (_, matcher) in zip(allowed, self._rows):
            matcher.restrict(row)
        banned = torch.from_numpy(allowed == 0)
        self._banned = banned.pin_memory() if self._device.type == "cuda" else banned
