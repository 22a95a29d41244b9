"""Low-rank terms of adapters: the reference and the Triton kernels.

Oracle: the formula in float64 numpy-style torch, row by row. Bitwise tests compare a row alone with
the same row in a mixed batch.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.bench.cross_compile import TARGETS, cross_compile, table
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.lora.lines import LineGroups
from oxillama_torch.kernels.lora.op import FactorTable, LowRank, RowGroups, lora, padded_rank
from oxillama_torch.kernels.registry import use_kernels

CPU = torch.device("cpu")
SIZES = (96, 40, 33)  # none is a multiple of a tile of outputs
INPUTS = 1100  # two splits, and no multiple of a tile
RANKS = (3, 16, 40)
BACKENDS = [
    "reference",
    "cpu",
    pytest.param(
        "triton",
        marks=[
            pytest.mark.interpret,
            pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU only"),
        ],
    ),
]
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def pack(values, dtype):
    data = values.to(dtype).contiguous().view(torch.uint8).flatten()
    return PackedTensor.from_bytes(NAMES[dtype], data, tuple(values.shape))


def term(rank, outputs, inputs=INPUTS, dtype=torch.float32, gain=False):
    """A term and its delta W, float64 [N, K], without the gain."""
    a, b = torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank)
    a, b = a.to(dtype).float(), b.to(dtype).float()
    full = padded_rank(rank)
    wide_a, wide_b = torch.zeros(full, inputs), torch.zeros(outputs, full)
    wide_a[:rank], wide_b[:, :rank] = a, b
    packed = pack(wide_a, dtype), pack(wide_b, dtype)
    return LowRank(*packed, torch.randn(outputs) if gain else None), b.double() @ a.double()


@pytest.fixture
def adapters():
    """Three adapters of different ranks; the second leaves the middle layer alone."""

    def make(dtype=torch.float32, gain=False):
        tables, deltas = [], []
        for index, rank in enumerate(RANKS):
            terms = [term(rank, size, dtype=dtype, gain=gain) for size in SIZES]
            if index == 1:
                terms[1] = (None, torch.zeros(SIZES[1], INPUTS).double())
            # one layer of another product comes first, so that numbers count
            tables.append(FactorTable([None, *(entry for entry, _ in terms)], CPU))
            deltas.append(torch.cat([delta for _, delta in terms]))
        return tables, deltas

    return make


SLOTS = [0] * 18 + [1] * 3 + [2] * 2  # two tiles of the first adapter
ROWS = torch.randperm(30, generator=torch.Generator().manual_seed(3)).tolist()[: len(SLOTS)]
SCALES = [0.25 * (index % 7) - 0.5 for index in range(len(SLOTS))]


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_are_added_to_the_right_rows_and_columns(backend, dtype, adapters, poisoned_memory):
    tables, deltas = adapters(dtype)
    x, y = torch.randn(30, INPUTS).to(dtype), torch.randn(30, sum(SIZES)).to(dtype)
    expected = y.double()
    for slot, row, scale in zip(SLOTS, ROWS, SCALES):
        expected[row] += scale * (deltas[slot] @ x[row].double())
    groups = RowGroups(tables, SLOTS, ROWS, SCALES, CPU)
    with use_kernels(f"lora={backend}"):
        got = lora(y, x, groups, 1, SIZES)
    assert got is y
    # h is rounded to the dtype on its way
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch(backend, adapters):
    tables, _ = adapters()
    x, y = torch.randn(30, INPUTS), torch.randn(30, sum(SIZES))
    groups = RowGroups(tables, SLOTS, ROWS, SCALES, CPU)
    with use_kernels(f"lora={backend}"):
        together = lora(y.clone(), x, groups, 1, SIZES)
        for index in (0, 17, 19, 22):
            row, slot = ROWS[index], SLOTS[index]
            only = RowGroups([tables[slot]], [0], [0], [SCALES[index]], CPU)
            alone = lora(y[row : row + 1].clone(), x[row : row + 1], only, 1, SIZES)
            assert torch.equal(alone[0], together[row])
    untouched = sorted(set(range(30)) - set(ROWS))
    assert torch.equal(together[untouched], y[untouched])


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU only")
def test_rows_by_lines_have_the_same_bits(adapters, poisoned_memory):
    """Tiles that nobody needs, room for larger ranks, and a layer that nobody adds to."""
    tables, _ = adapters()
    x, y = torch.randn(30, INPUTS), torch.randn(30, sum(SIZES))
    groups = RowGroups(tables, SLOTS, ROWS, SCALES, CPU)
    nothing = FactorTable([None] * 5, CPU)
    tiles = torch.zeros(30, 3, dtype=torch.int64)
    tiles[:, 0] = nothing.addresses.data_ptr()
    tiles[: len(groups.tiles)] = groups.tiles
    rows, scales = torch.zeros(30, dtype=torch.int64), torch.zeros(30)
    rows[: len(ROWS)], scales[: len(ROWS)] = groups.rows, groups.scales
    lines = LineGroups(tiles, rows, scales, layers=0b01110, rank=64, dtype=torch.float32)
    with use_kernels("lora=triton"):
        expected = lora(y.clone(), x, groups, 1, SIZES)
        assert torch.equal(lora(y.clone(), x, lines, 1, SIZES), expected)
    for first in (0, 4):
        assert not lines.changes(first, 1)
    with use_kernels("lora=reference"), pytest.raises(UnsupportedError, match="CUDA graph"):
        lora(y.clone(), x, lines, 1, SIZES)


def test_gains_weigh_the_product_without_its_bias(adapters):
    tables, deltas = adapters(gain=True)
    x, base, bias = torch.randn(3, INPUTS), torch.randn(3, sum(SIZES)), torch.randn(sum(SIZES))
    y = base + 1  # another adapter came before
    expected = y.double() + 0.5 * (x.double() @ deltas[2].T)
    gains = torch.cat([entry.gain for entry in tables[2].entries[1:]])
    expected += 0.5 * gains * (base - bias).double()
    groups = RowGroups([tables[2]], [0, 0, 0], [0, 1, 2], [0.5] * 3, CPU)
    got = lora(y, x, groups, 1, SIZES, base=base, bias=bias)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_no_adapter_touches_are_left_alone(adapters):
    tables, _ = adapters()
    y = torch.randn(2, 24)
    groups = RowGroups(tables[:1], [0], [1], [1.0], CPU)
    assert torch.equal(lora(y.clone(), torch.randn(2, 5), groups, 0, (24,)), y)


def test_shapes_that_do_not_fit_are_named(adapters):
    tables, _ = adapters()
    groups = RowGroups(tables[:1], [0], [1], [1.0], CPU)
    with pytest.raises(ValueError, match=r"y: got shape \(2, 3\).*wanted \(M, 169\)"):
        lora(torch.zeros(2, 3), torch.zeros(2, INPUTS), groups, 1, SIZES)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 8\), wanted \(2, K\)"):
        lora(torch.zeros(2, 169), torch.zeros(4, 8), groups, 1, SIZES)


@pytest.mark.timeout(600)
def test_kernels_compile_everywhere_without_spills():
    """Oracle: ptxas and the disassembler of Triton's wheel."""
    reports = cross_compile("oxillama_torch.kernels.lora.variants:variants", match="bf16|fp32-3")
    assert {report.capability for report in reports} == set(TARGETS)
    dirty = [report for report in reports if report.spills or report.local_bytes]
    assert not dirty, f"local memory is used:\n{table(dirty)}"
