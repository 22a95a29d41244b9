"""What a matmul kernel compiles to: registers, spills, shared memory, instructions per weight.

Read off the cross-compiled kernel (``cross_compile``), so no GPU is needed; the configs are those
that launches use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

from oxillama_torch.bench.cross_compile import Report, cross_compile
from oxillama_torch.bench.kernel_table import Row
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.registry import Call

__all__ = ["compiled_facts", "untimed_rows", "with_facts"]

_VARIANTS = "oxillama_torch.kernels.quant_matmul.variants:variants"
_GEMM_TILES = (16, 32, 64, 128)
_INVARIANT = "triton.invariant"
# Backend -> its variants' names in kernels/quant_matmul/variants.py.
_KERNELS = {
    "triton.gemv": "gemv",
    "triton.dp4a": "dp4a",
    "triton.gemm": "gemm{tile}",
    _INVARIANT: "gemm16",
}


def compiled_facts(rows: Iterable[Row], capability: int) -> dict[tuple[str, str, int], Report]:
    """Compile what the rows' Triton backends run.

    Args:
        rows: of the kernel table.
        capability: such as 90 for sm_90.

    Returns: (backend, type, m) -> report, where the backend is one of ours.
    """
    names = {(row.backend, row.type, row.m): _variant_name(row) for row in rows}
    wanted = {name for name in names.values() if name}
    if not wanted:
        return {}
    reports = cross_compile(_VARIANTS, (capability,), match=f"^({'|'.join(sorted(wanted))})$")
    found = {report.name: report for report in reports}
    return {key: found[name] for key, name in names.items() if name in found}


def untimed_rows(types: Iterable[str], rows: Iterable[int], shape: tuple[int, int]) -> list[Row]:
    """Rows of the Triton matmuls as a GPU would choose them, for a machine that has none."""
    found, rows = [], list(rows)
    for type_name, m, numerics in itertools.product(types, rows, ("invariant", "fast")):
        call = Call("cuda", torch.bfloat16, numerics, type_name, m)
        chosen = registry.select("quant_matmul", call).backend
        for kernel, refused in registry.candidates("quant_matmul", call):
            name = kernel.backend
            if (
                refused is None
                and name in _KERNELS
                and (name == _INVARIANT) != (numerics == "fast")
            ):
                what = {"op": "quant_matmul", "backend": name, "type": type_name, "m": m}
                place = {"n": shape[0], "k": shape[1], "label": "", "numerics": numerics}
                found.append(Row(**what, **place, chosen=name == chosen, note="no GPU"))
    return found


def with_facts(row: Row, reports: dict[tuple[str, str, int], Report]) -> Row:
    """A row with what its kernel compiled to, where that is known."""
    report = reports.get((row.backend, row.type, row.m))
    if report is None:
        return row
    return replace(
        row,
        capability=report.capability,
        registers=report.registers,
        spills=report.spills,
        shared_bytes=report.shared_bytes,
        instructions_per_weight=report.per_weight,
    )


def _variant_name(row: Row) -> str | None:
    """The variant (``kernels/quant_matmul/variants.py``) that serves a row, with bfloat16."""
    tile = next((tile for tile in _GEMM_TILES if row.m <= tile), _GEMM_TILES[-1])
    kernel = _KERNELS.get(row.backend, "").format(tile=tile)
    return f"{kernel}-{row.type.lower()}" if kernel and row.op == "quant_matmul" else None
