"""Time the backends of ``quant_matmul``: every type, several numbers of rows, one shape.

Each backend is compared with the reference before it is timed; one that is wrong gets no time.

Shapes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from oxillama_torch.bench.ceilings import Ceilings
from oxillama_torch.bench.kernel_check import check_kernel, random_weight
from oxillama_torch.bench.timing import copies_past_cache, measure
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import Call, Kernel

__all__ = ["SHAPES", "Row", "kernel_table"]

#: Named (N, K): the layers of real models.
SHAPES = {
    "llama-8b-up": (14336, 4096),
    "llama-8b-qo": (4096, 4096),
    "llama-1b-up": (8192, 2048),
    "demo-up": (768, 256),
}
_CHECK_SHAPE = (96, 512)


@dataclass(frozen=True, slots=True)
class Row:
    """One backend on one type and number of rows.

    Args:
        chosen: whether selection takes it for this call.
        relative_l2: error against the reference.
        microseconds: median; None when it was not timed (see ``note``).
        gigabytes_per_s: bytes of weights, activations and outputs over the time.
        share_of_copy: of the copy bandwidth measured on this device.
        share_of_matmul: 2 M N K over the time, as a share of the dense matmul rate measured.
    """

    backend: str
    type: str
    m: int
    n: int
    k: int
    numerics: str
    chosen: bool
    relative_l2: float | None = None
    microseconds: float | None = None
    spread: float | None = None
    gigabytes_per_s: float | None = None
    share_of_copy: float | None = None
    share_of_matmul: float | None = None
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
    backends: Iterable[str] | None = None,
    seconds: float = 0.1,
) -> Iterator[Row]:
    """Time every backend that serves a call with either numerics.

    Args:
        types: GGML type names.
        rows: numbers of rows M.
        shape: (N, K).
        backends: only these; None: all but ``reference`` where others serve.
        seconds: to measure each.
    """
    rows = list(rows)
    for type_name in types:
        weight = random_weight(type_name, *shape)
        copies = [weight.to(device) for _ in range(copies_past_cache(weight.nbytes))]
        if device == "cpu":
            copies = [_cloned(weight) for _ in copies]
        for m in rows:
            for kernel, numerics in _serving(type_name, m, device, dtype, backends):
                yield _time(kernel, numerics, copies, m, ceilings, device, dtype, seconds)


def _cloned(weight: PackedTensor) -> PackedTensor:
    planes = {name: plane.clone() for name, plane in weight.planes.items()}
    return PackedTensor(weight.format, weight.shape, planes)


def _serving(
    type_name: str, m: int, device: str, dtype: torch.dtype, backends: Iterable[str] | None
) -> list[tuple[Kernel, str]]:
    """Backends that serve the call, each with the strictest numerics it serves."""
    found: dict[str, tuple[Kernel, str]] = {}
    for numerics in ("invariant", "fast"):
        call = Call(device, dtype, numerics, type_name, m)
        for kernel, refused in registry.candidates("quant_matmul", call):
            if refused is None:
                found.setdefault(kernel.backend, (kernel, numerics))
    if backends is not None:
        return [found[name] for name in backends if name in found]
    return [pair for name, pair in found.items() if name != "reference" or len(found) == 1]


def _time(
    kernel: Kernel,
    numerics: str,
    weights: list[PackedTensor],
    m: int,
    ceilings: Ceilings,
    device: str,
    dtype: torch.dtype,
    seconds: float,
) -> Row:
    (n, k), type_name = weights[0].shape, weights[0].type_name
    call = Call(device, dtype, numerics, type_name, m)
    row = {
        "backend": kernel.backend,
        "type": type_name,
        "m": m,
        "n": n,
        "k": k,
        "numerics": numerics,
        "chosen": registry.select("quant_matmul", call).backend == kernel.backend,
    }
    if kernel.backend != "reference":
        check = check_kernel(kernel, type_name, (m, *_CHECK_SHAPE), device, dtype)
        row["relative_l2"] = check.relative_l2
        if check.nans or check.relative_l2 > 10 * check.bound:
            return Row(**row, note="wrong: not timed")
    xs = [torch.randn(m, k, device=device).to(dtype) for _ in weights]
    calls = [
        lambda x=x, weight=weight: kernel.function(x, weight, None)
        for x, weight in zip(xs, weights)
    ]
    timing = measure(calls, device, seconds=seconds)
    nbytes = weights[0].nbytes + (m * k + m * n) * xs[0].element_size()
    return Row(
        **row,
        microseconds=timing.median * 1e6,
        spread=(timing.high - timing.low) / timing.median,
        gigabytes_per_s=nbytes / timing.median / 1e9,
        share_of_copy=nbytes / timing.median / ceilings.copy,
        share_of_matmul=2 * m * n * k / timing.median / ceilings.matmul,
    )
