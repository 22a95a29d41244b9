"""Custom processors: functions of one's own that change one request's logits, step 0 of the chain.

    >>> @register_processor("no_digits")
    ... def no_digits(token_ids, logits):        # list[int] so far, float32 [V]
    ...     return logits.index_fill(0, DIGITS, -torch.inf)

A processor sees the raw logits of one row and the request's tokens, prompt included. What it bans
stays banned, what it favours is still subject to bans, grammar and all other steps. Requests name
processors; code never comes with a request.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from oxillama_torch.errors import EngineError, RequestError, UnsupportedError
from oxillama_torch.sampling.row import Processor, SamplingRow

__all__ = ["apply_processors", "find_processors", "load_processor", "register_processor"]

_registered: dict[str, Processor] = {}
_loaded: set[str] = set()

_SPECS = ("name=module:function", "name=file.py:function")

log = logging.getLogger(__name__)


def register_processor(name: str, function: Processor | None = None) -> Callable:
    """Make a processor known under a name; as a decorator, or with the function.

    Args:
        name: what requests call it.
        function: (token ids, float32 [V]) -> float [V]. It runs in the batching thread: all
            requests wait for it.

    Raises:
        RequestError: another function has that name.
    """

    def register(function: Processor) -> Processor:
        if _registered.setdefault(name, function) is not function:
            raise RequestError(f"a processor {name!r} is registered already", param="processors")
        return function

    return register if function is None else register(function)


def load_processor(spec: str) -> str:
    """Register what ``name=module:function`` or ``name=path/to/file.py:function`` names, once.

    Returns: the name.

    Raises:
        UnsupportedError: it cannot be imported, or the text has another form.
    """
    name, _, target = spec.partition("=")
    module, _, attribute = target.rpartition(":")
    if not (name and module and attribute):
        raise UnsupportedError(f"processor {spec!r}", _SPECS)
    if spec not in _loaded:
        try:
            register_processor(name, getattr(_module(module), attribute))
        except (ImportError, OSError, AttributeError) as error:
            raise UnsupportedError(f"processor {name!r} ({error})", _SPECS) from error
        _loaded.add(spec)
    return name


def _module(name: str) -> ModuleType:
    """A module by name, or a file of its own."""
    if not name.endswith(".py"):
        return import_module(name)
    spec = spec_from_file_location(f"oxillama_processors_{Path(name).stem}", name)
    assert spec is not None and spec.loader is not None, "it ends in .py"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_processors(names: Iterable[str]) -> tuple[Processor, ...]:
    """The functions that a request names.

    Raises:
        RequestError: one is not registered.
    """
    unknown = [name for name in names if name not in _registered]
    if unknown:
        known = ", ".join(sorted(_registered)) or "none"
        raise RequestError(f"unknown processor {unknown[0]!r}; known: {known}", param="processors")
    return tuple(_registered[name] for name in names)


def apply_processors(
    logits: torch.Tensor, rows: Sequence[SamplingRow]
) -> tuple[torch.Tensor, dict[int, EngineError]]:
    """Run the processors of the rows that have any.

    Args:
        logits: float32 [R, V], left as it is.
        rows: one per row.

    Returns: logits, the same tensor when no row has one; and the rows whose processor failed.
    """
    asking = [index for index, row in enumerate(rows) if row.processors]
    if not asking:
        return logits, {}
    logits = logits.clone()
    failed: dict[int, EngineError] = {}
    for index in asking:
        try:
            logits[index] = _run(rows[index], logits[index])
        except EngineError as error:
            failed[index] = error
    return logits, failed


def _run(row: SamplingRow, logits: torch.Tensor) -> torch.Tensor:
    for name, function in zip(row.params.processors, row.processors):
        try:
            result = function(list(row.token_ids), logits.clone())
        except Exception as error:
            log.exception("processor %r failed", name)
            raise EngineError(f"processor {name!r} failed") from error
        if not isinstance(result, torch.Tensor) or result.shape != logits.shape:
            raise EngineError(f"processor {name!r} returned no logits of shape {[*logits.shape]}")
        result = result.to(logits)
        if not bool((result < torch.inf).all()):  # false for NaN too
            raise EngineError(f"processor {name!r} returned NaN or plus infinity")
        logits = result
    return logits
