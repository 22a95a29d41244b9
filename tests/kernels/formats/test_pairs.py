"""Tile decoders in bfloat16, interpreted or on a GPU, within the bound that ``pairs`` states.

Shapes: N rows, K weights per row.

Oracle: gguf-py; the bound needs its values of blocks whose quants are all 0, which are the minima.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from oxillama_torch.kernels import formats  # noqa: E402
from oxillama_torch.kernels.formats import PackedTensor  # noqa: E402
from tests.support.blocks import TYPES, oracle, tame_blocks  # noqa: E402
from tests.support.tile_kernel import decode_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRED = [name for name in TYPES if formats.get(name).decode_pairs is not None]
N = 7  # no multiple of BLOCK_N
pytestmark = pytest.mark.interpret


def decode(weight: PackedTensor, block_k: int) -> torch.Tensor:
    """float32 [N, K] by the decoder; NaN where it stored nothing."""
    out = torch.full(weight.shape, torch.nan, device=DEVICE)
    columns = weight.shape[1]
    decode_kernel[(2, columns // block_k)](
        out, *weight.to(DEVICE).tile_args(), N, columns,
        DECODE=weight.format.decode_pairs, BLOCK_N=4, BLOCK_K=block_k,
    )  # fmt: skip
    return out.cpu()


def least_of(weight: PackedTensor) -> torch.Tensor:
    """What is subtracted from each weight, or 0: float32 [N, K]."""
    if "dm" not in weight.planes:
        return torch.zeros(weight.shape)
    planes = {n: torch.zeros_like(p) if n[0] == "q" else p for n, p in weight.planes.items()}
    return -weight.format.dequantize_planes(planes)


def test_the_types_that_people_use_have_one():
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= {*PAIRED}


@pytest.mark.parametrize("block_k", [32, 64, 128, 256])
@pytest.mark.parametrize("name", PAIRED)
def test_weights_are_off_by_two_roundings(name: str, block_k: int) -> None:
    format = formats.get(name)
    if block_k == 32 and format.block_weights == 256:
        pytest.skip("tiles of blocks of 256 have 64 weights or more")
    columns = max(256, 2 * block_k)
    blocks = tame_blocks(name, N, columns, seed=block_k)
    weight = PackedTensor.from_bytes(name, blocks.flatten(), (N, columns))
    values, least = oracle(name, blocks), least_of(weight)
    bound = 2**-7 * ((values + least).abs() + least.abs())
    got = decode(weight, block_k)
    assert torch.equal(got, got.to(torch.bfloat16).float())
    off = (got - values).abs()
    assert (off <= bound).all(), f"{(off / bound).max():.3g} of the bound"
    # Two weights of a word in the wrong order would be off by as much as they differ.
    assert off.mean() < 2**-8 * values.abs().mean()


@pytest.mark.parametrize("name", PAIRED)
def test_masked_rows_are_not_read(name: str) -> None:
    blocks = tame_blocks(name, 4, 256, seed=1)
    weight = PackedTensor.from_bytes(name, blocks.flatten(), (4, 256)).to(DEVICE)
    out = torch.full((4, 256), torch.nan, device=DEVICE)
    decode_kernel[(1, 4)](
        out, *weight.tile_args(), 2, 256,
        DECODE=weight.format.decode_pairs, BLOCK_N=4, BLOCK_K=64, FAR=True,
    )  # fmt: skip
    assert out[2:].eq(0).all() and out[:2].isfinite().all()
