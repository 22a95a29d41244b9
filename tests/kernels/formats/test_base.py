"""Packed tensors, the table of formats and its errors. Oracle: gguf-py, and arithmetic by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.formats.base import MAX_PLANES, make_plane
from tests.support.blocks import assert_same_bits, oracle, random_blocks


def packed(name: str, rows: int, columns: int) -> tuple[PackedTensor, torch.Tensor]:
    blocks = random_blocks(name, rows, columns)
    return PackedTensor.from_bytes(name, blocks.flatten(), (rows, columns)), oracle(name, blocks)


def test_get_takes_names_and_types() -> None:
    assert formats.get("q4_k") is formats.get(GGMLType.Q4_K) is formats.get("Q4_K")
    assert formats.get("Q4_K").name == "Q4_K"


@pytest.mark.parametrize("name", ["Q9_9", "base", "bits", "../q4_k", GGMLType.I32])
def test_get_refuses_unknown_types(name) -> None:
    with pytest.raises(UnsupportedError, match="no format for GGML type .*supported: .*Q4_K, "):
        formats.get(name)


def test_formats_load_one_by_one_and_without_triton() -> None:
    """A process in which Triton cannot be imported, as where it is not installed."""
    code = """
import sys
from dataclasses import replace
sys.modules["triton"] = None
from oxillama_torch.kernels import formats
assert formats.get("q6_k").decode_tile is None
assert formats.dequantize("Q6_K", bytes(210)).tolist() == [0.0] * 256
assert "oxillama_torch.kernels.formats.q4_k" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_dequantize_takes_bytes_arrays_and_tensors() -> None:
    blocks = random_blocks("Q8_0", 3, 64).flatten(1)
    wanted = oracle("Q8_0", blocks)
    assert_same_bits(formats.dequantize("Q8_0", blocks), wanted)
    assert_same_bits(formats.dequantize("Q8_0", blocks.numpy()), wanted)
    assert_same_bits(formats.dequantize("Q8_0", blocks.numpy().tobytes()), wanted.flatten())
    assert formats.dequantize("Q8_0", b"").shape == (0,)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_dequantize_takes_unaligned_slices(start: int) -> None:
    blocks = random_blocks("Q5_0", 1, 64).flatten()
    shifted = torch.cat((torch.zeros(start, dtype=torch.uint8), blocks))[start:]
    wanted = oracle("Q5_0", blocks.view(1, -1)).flatten()
    assert_same_bits(formats.dequantize("Q5_0", shifted), wanted)


@pytest.mark.parametrize("data", [bytes(35), np.zeros(34, np.int8), torch.zeros(17)])
def test_dequantize_refuses_other_data(data) -> None:
    with pytest.raises(ValueError, match="Q8_0 data is uint8 in multiples of 34 bytes"):
        formats.dequantize("Q8_0", data)


def test_rows_share_memory_and_nest() -> None:
    weight, values = packed("Q6_K", 12, 512)
    part = weight.rows(4, 10).rows(1, 3)
    assert part.shape == (2, 512)
    assert_same_bits(part.dequantize(), values[5:7])
    for name, plane in part.planes.items():
        assert plane.data_ptr() == weight.planes[name][5:].data_ptr()


def test_to_keeps_the_alignment_of_rows() -> None:
    weight, _ = packed("Q4_0", 3, 96)  # d: 6 bytes a row, padded to 16
    moved = weight.to("meta")
    assert weight.to("cpu") is weight
    assert moved.device.type == "meta"
    assert moved.shape == weight.shape
    for name, plane in moved.planes.items():
        assert plane.stride() == weight.planes[name].stride()
        assert plane.shape == weight.planes[name].shape


def test_nbytes_counts_what_is_held() -> None:
    assert packed("Q4_0", 3, 96)[0].nbytes == 3 * (48 + 16)
    assert packed("BF16", 2, 8)[0].nbytes == 32


def test_tile_args_fill_up_with_the_first_plane() -> None:
    weight, _ = packed("Q8_0", 2, 64)
    p0, p1, p2, p3, *strides = weight.tile_args()
    assert (p0, p1) == (weight.planes["qs"], weight.planes["d"])
    assert p2 is p3 is p0
    assert strides == [64, 8, 64, 64]
    assert len(strides) == MAX_PLANES


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ4_NL"])
def test_tile_args_end_with_the_codebook(name: str) -> None:
    weight, _ = packed(name, 2, 512)
    *planes, table = weight.tile_args()[:MAX_PLANES]
    assert planes[: len(weight.planes)] == list(weight.planes.values())
    assert table is weight.format.table(weight.device)
    assert table is weight.rows(1, 2).tile_args()[MAX_PLANES - 1], "a copy for each call"


def test_a_codebook_takes_the_place_of_a_plane() -> None:
    with pytest.raises(AssertionError, match="more than 3 planes"):
        replace(formats.get("Q5_K"), table=lambda device: torch.zeros(1))


@pytest.mark.parametrize(
    ("data", "shape", "error", "message"),
    [
        (torch.zeros(34, dtype=torch.uint8), (1, 33), UnsupportedError, "Q8_0 rows of 33 weights"),
        (torch.zeros(33, dtype=torch.uint8), (1, 32), ValueError, r"uint8 \[34\], not .* \[33\]"),
        (torch.zeros(34, dtype=torch.int8), (1, 32), ValueError, r"not torch.int8 \[34\]"),
        (torch.zeros(1, 34, dtype=torch.uint8), (1, 32), ValueError, r"not torch.uint8 \[1, 34\]"),
    ],
)
def test_from_bytes_refuses(data, shape, error, message: str) -> None:
    with pytest.raises(error, match=message):
        PackedTensor.from_bytes("Q8_0", data, shape)


def test_a_tensor_without_rows() -> None:
    weight = PackedTensor.from_bytes("Q4_K", torch.empty(0, dtype=torch.uint8), (0, 256))
    assert weight.dequantize().shape == (0, 256)


def test_padding_between_rows_is_zero(poisoned_memory) -> None:
    plane = make_plane(torch.ones(3, 1, 5))
    whole = plane.as_strided((3, 8), (8, 1))
    assert whole.tolist() == [[1.0] * 5 + [0.0] * 3] * 3
