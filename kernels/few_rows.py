"""What the compiled kernels of few rows on a CPU share: norms, activations, rotation, attention.

With the row or two of a decoding step an operation of eager torch costs its dispatch, a few
microseconds each, and such a kernel is up to twenty of them. ``compiled`` backends are one
:class:`program.Program` instead. They are made when a large model is loaded, never while serving,
and compared with the reference before they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.program import compiler
from oxillama_torch.kernels.registry import Call

__all__ = ["MAX_ROWS", "OPTIONS", "Readiness"]

log = logging.getLogger(__name__)

#: With more, eager operations are no longer bound by their dispatch, and use all threads.
MAX_ROWS = 31
#: Of Inductor. One thread: waking the others takes longer than the work of a few rows.
OPTIONS = {
    "cpp.threads": 1,
    "compile_threads": 1,
    "cpp.enable_unsafe_math_opt_flag": False,
}

_Result = Tensor | tuple[Tensor, ...]


class Readiness:
    """Which programs of an op's ``compiled`` backend are made, and why it cannot be used.

    Args:
        op: whose backend it is.
        error: largest difference from the reference that ``prepare`` lets pass, relative and
            absolute; the inputs are of size one.
    """

    def __init__(self, op: str, error: float = 1e-4) -> None:
        self.op, self.error = op, error
        self._made: set[Hashable] = set()
        self._broken: str | None = None

    def cannot(self, call: Call) -> str | None:
        """For ``capability`` of ``registry.register``."""
        if call.dtype != torch.float32:
            return f"serves float32, not {call.dtype}"
        return self._broken if compiler() else "no C++ compiler found"

    def not_by_default(self, call: Call) -> str | None:
        """For ``unless_asked`` of ``registry.register``."""
        return None if self._made else "not compiled when the model was loaded"

    def wanted(self, large: bool) -> bool:
        """Whether the backend will serve: a rule asks for it, or none speaks and it pays."""
        call = Call("cpu", torch.float32, "fast")
        if self.cannot(call) is not None:
            return False
        rules = [rule for rule in registry.active_rules() if rule.matches(self.op, call)]
        return rules[-1].names("compiled") if rules else large or bool(self._made)

    def prepare(
        self, key: Hashable, run: Callable[[], _Result], wanted: Callable[[], _Result]
    ) -> None:
        """Make a program by running it, unless that has been done.

        Args:
            key: of the program.
            run: the backend on some input;  wanted: the reference on the same.
        """
        if key in self._made or self._broken:
            return
        try:
            got, truth = run(), wanted()
        except RuntimeError as error:  # the base of Dynamo's, Inductor's and the compiler's errors
            self._broken = f"compiling failed: {str(error).strip().partition(chr(10))[0]}"
        else:
            if self._agree(got, truth):
                self._made.add(key)
            else:
                self._broken = "compiled code does not agree with the reference on this machine"
        if self._broken:
            log.warning("%s.compiled: %s", self.op, self._broken)
        registry.forget_choices()

    def _agree(self, got: _Result, truth: _Result) -> bool:
        if isinstance(got, Tensor):
            got, truth = (got,), (truth,)
        pairs = zip(got, truth, strict=True)
        return all(torch.allclose(*pair, rtol=self.error, atol=self.error) for pair in pairs)
