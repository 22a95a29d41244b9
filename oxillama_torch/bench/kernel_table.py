"""Time the backends of an op: every type, several numbers of rows, one shape.

Each backend is compared with the reference before it is timed; one that is wrong gets no time.

Shapes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from oxillama_torch.bench.cases import PACKED_OPS, Case, cases_of
from oxillama_torch.bench.ceilings import Ceilings
from oxillama_torch.bench.cost import cost_of
from oxillama_torch.bench.kernel_check import check_case
from oxillama_torch.bench.timing import Timing, TooLong, copies_past_cache, measure
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import Call, Kernel

__all__ = ["BASELINES", "SHAPES", "Row", "kernel_table", "parse_rows", "parse_shapes"]

#: Named (N, K): the layers of real models.
SHAPES = {
    "llama-8b-up": (14336, 4096),
    "llama-8b-down": (4096, 14336),
    "llama-8b-qo": (4096, 4096),
    "llama-1b-up": (8192, 2048),
    "demo-up": (768, 256),
}
#: What times are set against: the op's reference, and torch's own product with dense weights.
BASELINES = ("reference", "dense")
_CHECK_SHAPE = (96, 512)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``"llama-8b,4096x4096"``: names of SHAPES, what several of them begin with, or NxK.

    Raises:
        UnsupportedError: a part is none of these.
    """
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        named = [
            shape for name, shape in SHAPES.items() if name == part or name.startswith(f"{part}-")
        ]
        if not named and not (n.isdecimal() and k.isdecimal()):
            families = {name.rpartition("-")[0] for name in SHAPES}
            raise UnsupportedError(f"shape {part!r}", (*SHAPES, *sorted(families), "NxK"))
        found += named or [(int(n), int(k))]
    return found


def parse_rows(text: str) -> list[int]:
    """``"1,16"``: numbers of rows.

    Raises:
        UnsupportedError: a part is no positive number.
    """
    parts = text.split(",")
    for part in parts:
        if not part.isdecimal() or not int(part):
            raise UnsupportedError(f"number of rows {part!r}", ("whole numbers from 1",))
    return [int(part) for part in parts]


@dataclass(frozen=True, slots=True)
class Row:
    """One backend on one case.

    Args:
        label: tells cases of one op apart.
        chosen: whether selection takes it for this call.
        relative_l2: error against the reference.
        microseconds: median; None when it was not timed (see ``note``).
        note: why it was not timed, or a baseline was not.
        gigabytes_per_s: bytes of weights, activations and outputs over the time.
        teraflops: floating-point operations over the time; None where they are not counted.
        share_of_copy: of the copy bandwidth measured on this device.
        share_of_matmul: of the dense matmul rate measured.
        times_reference, times_dense: how many times faster than the baseline.
        capability ... instructions_per_weight: what the kernel compiles to, see ``compiled_facts``.
    """

    op: str
    backend: str
    type: str
    m: int
    n: int
    k: int
    label: str
    numerics: str
    chosen: bool
    relative_l2: float | None = None
    microseconds: float | None = None
    spread: float | None = None
    gigabytes_per_s: float | None = None
    teraflops: float | None = None
    share_of_copy: float | None = None
    share_of_matmul: float | None = None
    times_reference: float | None = None
    times_dense: float | None = None
    capability: int | None = None
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    instructions_per_weight: float | None = None
    note: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def kernel_table(
    types: Iterable[str],
    rows: Iterable[int],
    shape: tuple[int, int],
    ceilings: Ceilings,
    *,
    device: str,
    dtype: torch.dtype,
    op: str = "quant_matmul",
    backends: Iterable[str] | None = None,
    baselines: Iterable[str] = (),
    seconds: float = 0.1,
    limit: float = math.inf,
) -> Iterator[Row]:
    """Time every backend that serves a call with either numerics.

    Args:
        types: GGML type names; ops without packed weights take none.
        rows: numbers of rows M.
        shape: (N, K).
        op: one of ``cases.known_ops()``.
        backends: only these; None: all but ``reference`` where others serve.
        baselines: of BASELINES; each is timed once per case.
        seconds: to measure each.
        limit: seconds; what would take longer is called twice and gets a note instead of a time.
    """
    baselines, rows = set(baselines), list(rows)
    for type_name in types if op in PACKED_OPS else [None]:
        weights: list[PackedTensor] = []
        for m in rows:
            call = Call(device, dtype, type=type_name, m=m)
            rounds = _rounds(op, call, shape, weights)
            for cases in zip(*rounds):
                budget = {"seconds": seconds, "limit": limit}
                yield from _time_case(cases, shape, ceilings, backends, baselines, budget)


def _rounds(
    op: str, call: Call, shape: tuple[int, int], weights: list[PackedTensor]
) -> list[list[Case]]:
    """The cases of a call with as many sets of operands as it takes to miss the caches.

    Args:
        weights: packed weights made for an earlier number of rows, to be used again; extended.
    """
    first = cases_of(op, call, shape, weights[0] if weights else None)
    if op not in PACKED_OPS:
        nbytes = sum(x.nbytes for x in first[0].args if isinstance(x, torch.Tensor))
        more = copies_past_cache(nbytes) - 1
        return [first, *(cases_of(op, call, shape) for _ in range(more))]
    if not weights:
        [weight] = (x for x in first[0].args if isinstance(x, PackedTensor))
        weights.append(weight)
        weights += [_cloned(weight) for _ in range(copies_past_cache(weight.nbytes) - 1)]
    return [first, *(cases_of(op, call, shape, weight) for weight in weights[1:])]


def _cloned(weight: PackedTensor) -> PackedTensor:
    planes = {name: plane.clone() for name, plane in weight.planes.items()}
    return PackedTensor(weight.format, weight.shape, planes)


def _time_case(
    cases: tuple[Case, ...],
    shape: tuple[int, int],
    ceilings: Ceilings,
    backends: Iterable[str] | None,
    baselines: set[str],
    budget: dict[str, float],
) -> Iterator[Row]:
    """Every backend on one case (with operands to go round).

    Args:
        budget: ``seconds`` and ``limit`` of ``measure``.
    """
    found, missing = _baselines(cases, shape, baselines, budget)
    for kernel, numerics in _serving(cases[0], backends):
        row = _checked(kernel, numerics, cases[0], shape)
        if row.note:
            yield row
            continue
        try:
            timing = _measure(kernel, cases, budget)
        except TooLong as error:
            yield replace(row, note=f"not timed: {error}")
            continue
        yield _timed(replace(row, note=missing), timing, kernel, cases[0], ceilings, found)


def _baselines(
    cases: tuple[Case, ...], shape: tuple[int, int], wanted: set[str], budget: dict[str, float]
) -> tuple[dict[str, float], str]:
    """(field of Row -> seconds of the baseline, a note on those that would take too long)."""
    found, missing = {}, []
    for name in sorted(wanted):
        if name == "dense" and cases[0].op != "quant_matmul":
            continue
        try:
            if name == "dense":
                timing = _dense(cases[0], shape, budget)
            else:
                known = registry.candidates(cases[0].op, cases[0].call)
                [kernel] = (k for k, _ in known if _is_reference(k))
                timing = _measure(kernel, cases, budget)
        except TooLong as error:
            missing.append(f"{name} not timed: {error}")
        else:
            found[f"times_{name}"] = timing.median
    return found, "; ".join(missing)


def _timed(
    row: Row,
    timing: Timing,
    kernel: Kernel,
    case: Case,
    ceilings: Ceilings,
    baselines: dict[str, float],
) -> Row:
    """The row with its figures."""
    nbytes, flops = cost_of(case.op, case.args, case.run(kernel)[0])
    return replace(
        row,
        microseconds=timing.median * 1e6,
        spread=(timing.high - timing.low) / timing.median,
        gigabytes_per_s=nbytes / timing.median / 1e9,
        teraflops=flops / timing.median / 1e12 if flops else None,
        share_of_copy=nbytes / timing.median / ceilings.copy,
        share_of_matmul=flops / timing.median / ceilings.matmul if flops else None,
        **{name: seconds / timing.median for name, seconds in baselines.items()},
    )


def _is_reference(kernel: Kernel) -> bool:
    return kernel.backend == "reference"


def _serving(case: Case, backends: Iterable[str] | None) -> list[tuple[Kernel, str]]:
    """Backends that serve the call, each with the strictest numerics it serves."""
    found: dict[str, tuple[Kernel, str]] = {}
    for numerics in ("invariant", "fast"):
        call = case.call._replace(numerics=numerics)
        for kernel, refused in registry.candidates(case.op, call):
            if refused is None:
                found.setdefault(kernel.backend, (kernel, numerics))
    if backends is not None:
        return [found[name] for name in backends if name in found]
    return [pair for name, pair in found.items() if name != "reference" or len(found) == 1]


def _checked(kernel: Kernel, numerics: str, case: Case, shape: tuple[int, int]) -> Row:
    """The row of a backend before it is timed; with a note when it must not be."""
    call = case.call._replace(numerics=numerics)
    row = Row(
        op=case.op,
        backend=kernel.backend,
        type=call.type or "",
        m=call.m,
        n=shape[0],
        k=shape[1],
        label=case.label,
        numerics=numerics,
        chosen=registry.select(case.op, call).backend == kernel.backend,
    )
    if _is_reference(kernel):
        return row
    # On weights of the full size, the reference would take longer than what is to be timed.
    small = cases_of(case.op, call, _CHECK_SHAPE) if case.op in PACKED_OPS else [case]
    check = check_case(kernel, small[0])
    note = "" if check.passed else "wrong: not timed"
    return replace(row, relative_l2=check.relative_l2, note=note)


def _measure(kernel: Kernel, cases: tuple[Case, ...], budget: dict[str, float]) -> Timing:
    return measure([case.time(kernel) for case in cases], cases[0].call.device, **budget)


def _dense(case: Case, shape: tuple[int, int], budget: dict[str, float]) -> Timing:
    """torch's product with weights of the activations' dtype (float16 instead of bfloat16)."""
    dtype = torch.float16 if case.call.dtype == torch.bfloat16 else case.call.dtype
    x, device = case.args[0].to(dtype), case.call.device
    copies = copies_past_cache(shape[0] * shape[1] * dtype.itemsize)
    weights = [torch.randn(shape, device=device, dtype=dtype) for _ in range(copies)]
    calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    return measure(calls, device, **budget)
