"""Tile decoders, interpreted, against gguf-py; and compiled for the GPUs that are supported.

Shapes: N rows, K weights per row.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from oxillama_torch.bench.cross_compile import cross_compile, table  # noqa: E402
from oxillama_torch.kernels import formats  # noqa: E402
from oxillama_torch.kernels.formats import PackedTensor  # noqa: E402
from tests.support.blocks import TYPES, assert_same_bits, oracle, random_blocks  # noqa: E402
from tests.support.tile_kernel import decode_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 7  # no multiple of BLOCK_N: the last rows of the last tile are masked


def decode(name: str, blocks: torch.Tensor, columns: int, block_k: int) -> torch.Tensor:
    """float32 [N, K] by the tile decoder; NaN where it stored nothing."""
    rows = blocks.shape[0]
    weight = PackedTensor.from_bytes(name, blocks.flatten().to(DEVICE), (rows, columns))
    out = torch.full((rows, columns), torch.nan, device=DEVICE)
    launch(weight, out, rows, block_k)
    return out.cpu()


def launch(weight: PackedTensor, out: torch.Tensor, rows: int, block_k: int, **flags) -> None:
    columns = weight.shape[1]
    grid = (triton.cdiv(rows, 4), triton.cdiv(columns, block_k))
    # Without fused multiply-add a GPU gives the same bits as torch.
    decode_kernel[grid](
        out, *weight.tile_args(), rows, columns,
        DECODE=weight.format.decode_tile, BLOCK_N=4, BLOCK_K=block_k,
        enable_fp_fusion=False, **flags,
    )  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "block_k"),
    [
        (name, block_k)
        for name in TYPES
        for block_k in (32, 64, 128, 256)
        if block_k > 32 or formats.get(name).block_weights < 256
    ],
)
def test_tiles_equal_gguf_py(name: str, block_k: int) -> None:
    blocks = random_blocks(name, N, 768)
    assert_same_bits(decode(name, blocks, 768, block_k), oracle(name, blocks))


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_tiles_stop_at_the_end_of_a_row(name: str) -> None:
    blocks = random_blocks(name, N, 41)
    assert_same_bits(decode(name, blocks, 41, 32), oracle(name, blocks))


@pytest.mark.interpret
@pytest.mark.parametrize("name", TYPES)
def test_masked_rows_are_zero_and_not_read(name: str) -> None:
    blocks = random_blocks(name, 4, 256)
    weight = PackedTensor.from_bytes(name, blocks.flatten().to(DEVICE), (4, 256))
    out = torch.full((4, 256), torch.nan, device=DEVICE)
    launch(weight, out, 2, 64, FAR=True)  # rows from 2 on are far behind the end of the planes
    out = out.cpu()
    assert_same_bits(out[:2], oracle(name, blocks)[:2])
    assert out[2:].abs().eq(0).all()


@pytest.mark.timeout(900)
def test_tiles_compile_for_the_oldest_and_the_newest_gpu() -> None:
    """Inside the embedding kernel, which does little else; the matmul tests do sm_90 and 100."""
    source = "oxillama_torch.kernels.quant_matmul.variants:variants"
    reports = cross_compile(source, [80, 120], match="^embedding-")
    assert len(reports) == 2 * len(TYPES)
    spilled = [report for report in reports if report.local_bytes or report.spills]
    assert not spilled, table(spilled)
