"""Which function serves an op: registration, selection and the reasons for it.

An *op* is a signature (``quant_matmul``, ``attention``, ...). A *backend* is a named implementation
of it (``reference``, ``compiled``, ``cpu``, ``triton``, or a user's own). Selection, last wins:
registered priority < ``OXILLAMA_KERNELS`` < ``--kernels`` < ``PUT /admin/kernels`` <
``with use_kernels(...)``. A backend that cannot serve a call gives a reason; an override that
cannot serve raises with that reason: there is no silent fall-back.

Spec strings: ``"attention=reference"`` for a whole op, ``"quant_matmul.q4_k=triton.gemv"`` for one
GGML type of it, comma-separated. ``triton`` names the family ``triton.gemv``, ``triton.gemm``, ...:
the best of them that can serve is taken.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.types import GGMLType

__all__ = [
    "Call",
    "Kernel",
    "Rule",
    "active_rules",
    "candidates",
    "check_backend",
    "declare",
    "explain",
    "forget_choices",
    "format_rules",
    "is_observed",
    "load_file",
    "missing_modules",
    "observed",
    "parse_rules",
    "register",
    "registered_ops",
    "select",
    "set_rules",
    "use_kernels",
]

log = logging.getLogger(__name__)

# Modules whose import registers the shipped kernels of an op. Imported on first use of the op, so
# that Triton is imported only when an op that has Triton kernels is used.
_MODULES: dict[str, tuple[str, ...]] = {}
_KERNELS: dict[str, dict[str, Kernel]] = {}
_missing: dict[str, str] = {}
_lock = threading.RLock()


class Call(NamedTuple):
    """What selection may depend on. Everything else about a call is the launcher's business.

    A named tuple, because every op makes and hashes one: a dataclass takes five times as long.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: activation dtype.
        numerics: ``"invariant"`` or ``"fast"``.
        type: GGML type name of the weight, upper case, for ops on packed weights.
        m: number of rows.
    """

    device: str
    dtype: torch.dtype
    numerics: str = "invariant"
    type: str | None = None
    m: int = 1


@dataclass(frozen=True, slots=True)
class Kernel:
    """One backend of an op.

    Args:
        refuse: returns why this backend cannot serve a call, or None when it can.
        priority: among those that can, the highest is chosen when no rule names one.
        unless_asked: returns why it is not chosen for a call unless a rule names it, or None.
        error: relative L2 error that it states beyond the rounding of the activations' dtype.
        takes_quantized: has a keyword ``quantized`` for rows that are there in 8 bits already.
        takes_lines: learns from tensors alone which rows have which adapter
            (``lora.lines.LineGroups``), as a CUDA graph wants it.
    """

    op: str
    backend: str
    function: Callable
    refuse: Callable[[Call], str | None]
    priority: int
    unless_asked: Callable[[Call], str | None]
    error: float = 0.0
    takes_quantized: bool = False
    takes_lines: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """``backend`` serves ``op`` (of GGML type ``type``, when given)."""

    op: str
    backend: str
    type: str | None = None

    def matches(self, op: str, call: Call) -> bool:
        """Whether the rule speaks about this call."""
        return self.op == op and self.type in (None, call.type)

    def names(self, backend: str) -> bool:
        """Whether the rule asks for this backend, by its name or by its family's."""
        return backend == self.backend or backend.startswith(f"{self.backend}.")


def declare(op: str, *modules: str) -> None:
    """Name the modules that register the shipped backends of ``op``."""
    _MODULES[op] = modules


def register(
    op: str,
    backend: str,
    *,
    types: set[str] | None = None,
    m: tuple[int, int | None] = (1, None),
    devices: tuple[str, ...] = ("cpu", "cuda"),
    numerics: tuple[str, ...] = ("invariant", "fast"),
    capability: Callable[[Call], str | None] | None = None,
    unless_asked: Callable[[Call], str | None] | None = None,
    priority: int = 0,
    error: float = 0.0,
    takes_quantized: bool = False,
    takes_lines: bool = False,
) -> Callable[[Callable], Callable]:
    """Decorator that adds a backend to an op.

    Args:
        types: GGML type names served; None for all.
        m: inclusive range of rows served; None as upper end for no bound.
        devices, numerics: what it serves.
        capability: further reason to refuse a call, or None.
        unless_asked: reason not to be chosen unless a rule names the backend, or None.
        priority: the highest that can serve wins by default.
        error: relative L2 error of a result that is its own doing, such as activations rounded to
            8 bits; ``oxillama kernels check`` allows it.
        takes_quantized: it has a keyword ``quantized`` (``quant_matmul.quantized``).
        takes_lines: it serves ``lora.lines.LineGroups`` too.

    Raises:
        ValueError: the (op, backend) pair is taken.
    """

    def refuse(call: Call) -> str | None:
        if call.device not in devices:
            return f"runs on {'/'.join(devices)}, not on {call.device}"
        if types is not None and call.type not in types:
            return f"serves {', '.join(sorted(types))}, not {call.type}"
        if call.m < m[0] or (m[1] is not None and call.m > m[1]):
            return f"serves {m[0]} to {m[1] or 'any number of'} rows, not {call.m}"
        if call.numerics not in numerics:
            return f"serves {'/'.join(numerics)} numerics, not {call.numerics}"
        return capability(call) if capability else None

    def add(function: Callable) -> Callable:
        with _lock:
            backends = _KERNELS.setdefault(op, {})
            if backend in backends:
                raise ValueError(f"{op}={backend} is registered already")
            backends[backend] = Kernel(
                op,
                backend,
                function,
                refuse,
                priority,
                unless_asked or (lambda call: None),
                error,
                takes_quantized,
                takes_lines,
            )
            _cache.clear()
        return function

    return add


def _backends(op: str) -> dict[str, Kernel]:
    if op not in _MODULES:
        _declare_shipped()
    for module in _MODULES.get(op, ()):
        _load(module)
    if op not in _KERNELS:
        raise UnsupportedError(f"unknown op {op!r}", registered_ops())
    return _KERNELS[op]


def _load(module: str) -> None:
    """Import a module of kernels; one that wants a Triton that is not installed is left out."""
    if module in _missing:
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        _missing[module] = "Triton is not installed"
        log.info("%s left out: %s", module, _missing[module])


def _declare_shipped() -> None:
    """Import the launchers that ship with the package; each declares its ops."""
    package = importlib.import_module("oxillama_torch.kernels")
    for folder in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = f"{folder.name}.op"
        if folder.ispkg and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def load_file(path: str | Path) -> None:
    """Run a user's file that registers kernels of its own; once per path.

    Whatever it raises goes to the caller: a kernel that was asked for and does not load must not
    be replaced by another one.
    """
    name = f"oxillama_user_kernels_{abs(hash(str(Path(path).resolve())))}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise UnsupportedError(f"kernel file {path}", ("an existing file ending in .py",))
    module = importlib.util.module_from_spec(spec)
    # Triton looks the source of a kernel up through its module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def missing_modules() -> dict[str, str]:
    """Modules of kernels that were left out, each with the reason."""
    return dict(_missing)


def registered_ops() -> list[str]:
    """Names of all ops."""
    _declare_shipped()
    return sorted({*_MODULES, *_KERNELS})


def candidates(op: str, call: Call) -> list[tuple[Kernel, str | None]]:
    """All backends of ``op``, best first, each with its reason to refuse ``call`` or None."""
    kernels = sorted(_backends(op).values(), key=lambda k: (-k.priority, k.backend))
    return [(kernel, kernel.refuse(call)) for kernel in kernels]


def check_backend(backend: str, ops: Iterable[str]) -> None:
    """Raise unless some of ``ops`` have a backend of this name.

    Raises:
        UnsupportedError: none has; the message lists those there are.
    """
    ops = list(ops)
    known = sorted({name for op in ops for name in _backends(op)})
    if backend not in known:
        raise UnsupportedError(f"backend {backend!r} of {', '.join(ops)}", known)


def parse_rules(spec: str) -> tuple[Rule, ...]:
    """Parse ``"op=backend,op.type=backend"``.

    Raises:
        UnsupportedError: a part has another form, or names an unknown op, backend or GGML type.
    """
    rules = []
    for part in filter(None, (p.strip() for p in spec.split(","))):
        target, sep, backend = part.partition("=")
        if not sep or not backend:
            raise UnsupportedError(f"kernel rule {part!r} is not of the form op[.type]=backend")
        op, _, type_name = target.partition(".")
        known = _backends(op)
        rule = Rule(op, backend, type_name.upper() or None)
        if not any(rule.names(name) for name in known):
            raise UnsupportedError(f"op {op!r} has no backend {backend!r}", sorted(known))
        if type_name and type_name.upper() not in GGMLType.__members__:
            raise UnsupportedError(f"unknown GGML type {type_name!r}", GGMLType.__members__)
        rules.append(rule)
    return tuple(rules)


def format_rules(rules: tuple[Rule, ...]) -> str:
    """The spec string that ``parse_rules`` would make ``rules`` of."""
    return ",".join(
        f"{rule.op}.{rule.type.lower()}={rule.backend}"
        if rule.type
        else f"{rule.op}={rule.backend}"
        for rule in rules
    )


_rules: tuple[Rule, ...] = ()
_cache: dict[tuple[str, Call, tuple[Rule, ...]], Kernel] = {}


def set_rules(rules: str | tuple[Rule, ...]) -> None:
    """Replace the process-wide rules (environment, ``--kernels``, ``PUT /admin/kernels``)."""
    global _rules
    _rules = parse_rules(rules) if isinstance(rules, str) else tuple(rules)


def active_rules() -> tuple[Rule, ...]:
    """The rules in force, weakest first."""
    return _rules


@contextlib.contextmanager
def use_kernels(spec: str) -> Iterator[None]:
    """Add rules for the duration of a block. Process-wide: the engine thread sees them too."""
    global _rules
    # Parsed outside the lock: parsing may import kernels, and registering takes the lock.
    rules = parse_rules(spec)
    with _lock:
        before = _rules
        _rules = before + rules
    try:
        yield
    finally:
        _rules = before


_observer: Callable[[Kernel, Call], Kernel] | None = None


@contextlib.contextmanager
def observed(observer: Callable[[Kernel, Call], Kernel]) -> Iterator[None]:
    """Pass every kernel that is chosen through ``observer``, for profiling. Process-wide."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def is_observed() -> bool:
    """Whether somebody looks at single kernels, which a CUDA graph would hide."""
    return _observer is not None


def forget_choices() -> None:
    """Choose anew from here on: call this when what a backend can serve has changed."""
    with _lock:
        _cache.clear()


def select(op: str, call: Call) -> Kernel:
    """The kernel that serves ``call``; its choice and reason are logged once.

    Raises:
        UnsupportedError: a rule names a backend that refuses the call, or none can serve it.
    """
    rules = _rules
    key = (op, call, rules)
    kernel = _cache.get(key)
    if kernel is None:
        kernel, reason = explain(op, call)
        log.debug("%s %s: %s (%s)", op, call, kernel.backend, reason)
        _cache[key] = kernel
    return kernel if _observer is None else _observer(kernel, call)


def explain(op: str, call: Call) -> tuple[Kernel, str]:
    """The chosen kernel and why it was chosen.

    Raises:
        UnsupportedError: as for :func:`select`.
    """
    rule = next((rule for rule in reversed(_rules) if rule.matches(op, call)), None)
    refused = []
    for kernel, reason in candidates(op, call):
        if rule is not None and not rule.names(kernel.backend):
            continue
        if rule is None:
            reason = reason or kernel.unless_asked(call)
        if reason is None:
            chosen = "asked for by rule" if rule else "best that can serve this call"
            return kernel, "; ".join([chosen, *refused])
        refused.append(f"{kernel.backend} {reason}")
    if rule is not None:
        raise UnsupportedError(f"{op}={rule.backend} was asked for, but {'; '.join(refused)}")
    raise UnsupportedError(f"no backend of {op} serves {call}: {'; '.join(refused)}")
