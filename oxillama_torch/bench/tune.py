"""Find the fastest tile sizes of the matmul kernels on the device at hand, one by one.

Shapes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch

from oxillama_torch.bench.cases import Case, cases_of, random_weight
from oxillama_torch.bench.kernel_check import check_case
from oxillama_torch.bench.timing import Timing, copies_past_cache, measure
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul import configs
from oxillama_torch.kernels.quant_matmul.configs import Config
from oxillama_torch.kernels.registry import Call, Kernel

__all__ = ["Job", "Tuned", "as_table", "jobs", "tune"]

_CHECK_SHAPE = (192, 1024)
_MAX_ROWS = {"dp4a": configs.DP4A_MAX_ROWS, "gemv": configs.GEMV_MAX_ROWS}


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel, type and shape to find a config for; ``m`` rows are timed."""

    kernel: str
    type: str
    n: int
    k: int
    m: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came out of a job.

    Args:
        config: the fastest that computes what the reference does.
        microseconds: its median; ``default_microseconds``: that of the built-in config.
        tried, refused: configs timed; those that did not compile, or computed something else.
    """

    job: Job
    config: Config
    microseconds: float
    default_microseconds: float
    tried: int
    refused: int


def jobs(types: Iterable[str], rows: Iterable[int], shapes: Iterable[tuple[int, int]]) -> list[Job]:
    """What to tune: every kernel that serves a type with so many rows.

    The invariant kernel has one config for every number of rows, chosen by a decoding row.
    """
    from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS

    rows, found = sorted(set(rows)), []
    for type_name in types:
        for n, k in shapes:
            for kernel in ("dp4a", "gemv", "gemm"):
                if kernel == "dp4a" and type_name not in UNITS:
                    continue
                most = _MAX_ROWS.get(kernel)
                found += [
                    Job(kernel, type_name, n, k, m) for m in rows if most is None or m <= most
                ]
            found.append(Job("invariant", type_name, n, k, 1))
    return found


def tune(
    work: Iterable[Job],
    device: str,
    *,
    seconds: float = 0.05,
    most: int | None = None,
    progress: Callable[[Job, int, int], None] = lambda job, done, total: None,
) -> Iterator[Tuned]:
    """Time candidates of each job and take the fastest that is right.

    Args:
        work: see ``jobs``.
        device: a GPU, or ``cpu`` where Triton is interpreted.
        seconds: to measure each config.
        most: candidates per job; None: all.
        progress: gets (job, configs timed, configs in all).

    Raises:
        UnsupportedError: Triton does not run on the device.
    """
    from oxillama_torch.kernels.triton_support import DEVICES

    if torch.device(device).type not in DEVICES:
        raise UnsupportedError(f"tuning Triton kernels on {device}", DEVICES)
    weights: dict[tuple[str, int, int], list[PackedTensor]] = {}
    for job in work:
        key = (job.type, job.n, job.k)
        if key not in weights:
            weights = {key: _copies(*key, device)}  # of one shape at a time
        yield _run(job, weights[key], device, seconds, most, progress)


def _copies(type_name: str, n: int, k: int, device: str) -> list[PackedTensor]:
    weight = random_weight(type_name, n, k).to(device)
    clones = [
        PackedTensor(weight.format, weight.shape, {p: x.clone() for p, x in weight.planes.items()})
        for _ in range(copies_past_cache(weight.nbytes) - 1)
    ]
    return [weight, *clones]


def _run(
    job: Job,
    weights: list[PackedTensor],
    device: str,
    seconds: float,
    most: int | None,
    progress: Callable[[Job, int, int], None],
) -> Tuned:
    call = _call(job, device)
    launch = _launcher(job.kernel)
    [small] = cases_of("quant_matmul", call, _CHECK_SHAPE)
    cases = [cases_of("quant_matmul", call, (job.n, job.k), weight)[0] for weight in weights]
    todo = configs.candidates(job.kernel, formats.get(job.type), job.m)[:most]
    timed: list[tuple[float, Config]] = []
    for done, config in enumerate(todo):
        progress(job, done, len(todo))
        timing = _time(launch, config, small, cases, device, seconds)
        if timing is not None:
            timed.append((timing.median * 1e6, config))
    default = next((time for time, config in timed if config == todo[0]), float("nan"))
    if not timed:
        raise UnsupportedError(f"no config of {job.kernel} runs {job.type} on {device}")
    best, config = min(timed, key=lambda pair: pair[0])
    return Tuned(job, config, best, default, len(timed), len(todo) - len(timed))


def _call(job: Job, device: str) -> Call:
    cuda = torch.device(device).type == "cuda"
    numerics = "invariant" if job.kernel == "invariant" else "fast"
    dtype = torch.bfloat16 if cuda else torch.float32
    return Call(torch.device(device).type, dtype, numerics, job.type, job.m)


def _launcher(kernel: str) -> Callable[..., torch.Tensor]:
    from oxillama_torch.kernels.quant_matmul import triton_dp4a, triton_gemm, triton_gemv

    return {"dp4a": triton_dp4a, "gemv": triton_gemv}.get(kernel, triton_gemm).launch


def _time(
    launch: Callable[..., torch.Tensor],
    config: Config,
    small: Case,
    cases: list[Case],
    device: str,
    seconds: float,
) -> Timing | None:
    """The time of a config; None when it does not compile, does not fit, or is wrong."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    kernel = Kernel(
        "quant_matmul",
        "tuned",
        lambda x, weight, bias: launch(x, weight, bias, config),
        refuse=lambda call: None,
        priority=0,
        unless_asked=lambda call: None,
        error=2e-2,
    )
    try:
        if not check_case(kernel, small).passed:
            return None
        return measure([case.time(kernel) for case in cases], device, seconds=seconds)
    except (CompilationError, OutOfResources):
        return None


def as_table(found: Iterable[Tuned], device: str) -> dict[str, Any]:
    """The table that ``kernels/quant_matmul/tuned.py`` reads.

    A config that does not beat the default is kept too: it says that somebody looked.
    """
    import triton

    cuda = torch.device(device).type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "interpreter",
        "capability": 10 * major + minor,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": [
            {
                "kernel": t.job.kernel,
                "type": t.job.type,
                "n": t.job.n,
                "k": t.job.k,
                "m": None if t.job.kernel == "invariant" else t.job.m,
                "config": list(astuple(t.config)),
                "microseconds": round(t.microseconds, 3),
                "default_microseconds": round(t.default_microseconds, 3),
            }
            for t in found
        ],
    }
