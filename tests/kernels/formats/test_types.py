"""Every format against gguf-py, the reference in Python of ggml's block structs.

Shapes: N rows, B blocks per row, K weights per row.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats import PackedTensor
from tests.support.blocks import TYPES, assert_same_bits, oracle, random_blocks

N, K = 5, 768

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_every_format_is_tested() -> None:
    assert formats.known() == TYPES


@pytest.mark.parametrize("name", TYPES)
def test_dequantize_equals_gguf_py(name: str) -> None:
    blocks = random_blocks(name, N, K)
    assert_same_bits(formats.get(name).dequantize(blocks).flatten(1), oracle(name, blocks))


@pytest.mark.parametrize("name", TYPES)
def test_planes_give_the_same_weights_and_the_same_bytes(name: str) -> None:
    blocks = random_blocks(name, N, K)
    format = formats.get(name)
    planes = format.repack(blocks)
    assert tuple(planes) == tuple(format.fields)
    assert_same_bits(format.dequantize_planes(planes), oracle(name, blocks))
    assert torch.equal(format.unpack(planes), blocks)


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_planes_decode_into_a_buffer(name: str) -> None:
    blocks = random_blocks(name, N, K)
    weight = PackedTensor.from_bytes(name, blocks.flatten(), (N, K))
    out = torch.full((2, K), torch.nan)
    got = weight.rows(2, 4).dequantize(out)
    assert got.data_ptr() == out.data_ptr()
    assert_same_bits(out, oracle(name, blocks)[2:4])


@pytest.mark.parametrize("name", TYPES)
def test_planes_start_each_row_on_16_bytes(name: str) -> None:
    columns = TYPE_SIZES[GGMLType[name]].block_weights * 3
    blocks = random_blocks(name, N, columns)
    weight = PackedTensor.from_bytes(name, blocks.flatten(), (N, columns))
    for plane in weight.planes.values():
        assert plane.stride(0) * plane.element_size() % 16 == 0
        assert plane.stride(1) == 1
    assert_same_bits(weight.dequantize(), oracle(name, blocks))


@pytest.mark.parametrize("name", TYPES)
def test_zero_blocks_are_zero_weights(name: str) -> None:
    size = TYPE_SIZES[GGMLType[name]]
    weights = formats.dequantize(name, bytes(size.block_bytes))
    assert weights.abs().tolist() == [0.0] * size.block_weights


def half(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


# Blocks written by hand from the struct definitions, with the weights they must give.
def q4_0() -> tuple[list[int], dict[int, float]]:
    # Byte 0 is 0xF1: weight 0 is 1 - 8, weight 16 is 15 - 8; the other bytes give -8.
    return half(0.5) + [0xF1] + [0] * 15, {0: -3.5, 16: 3.5, 1: -4.0, 31: -4.0}


def q5_0() -> tuple[list[int], dict[int, float]]:
    # High bits of weights 1 (byte 0, bit 1) and 23 (byte 2, bit 7).
    block = half(2.0) + [0b10, 0, 0x80, 0] + [0x30] + [0x0F] + [0] * 14
    return block, {0: -32.0, 16: -26.0, 1: 30.0, 17: -32.0, 23: 0.0, 7: -32.0}


def q8_0() -> tuple[list[int], dict[int, float]]:
    return half(0.25) + [127, 128] + [0] * 29 + [255], {0: 31.75, 1: -32.0, 31: -0.25}


def q4_k() -> tuple[list[int], dict[int, float]]:
    # sc[0] = 63, m[0] = 1; sc[5] = 0b10_0011 and m[5] = 0b01_1010 have top bits in bytes 1 and 5.
    scales = [63, 0b10 << 6, 0, 0, 1, 0b01 << 6, 0, 0, 0, 0b1010_0011, 0, 0]
    qs = [0] * 128
    qs[0] = 0x0F  # weight 0
    qs[2 * 32 + 3] = 0x50  # weight 2 * 64 + 32 + 3, in group 5
    weights = {0: 63 * 15 - 0.5, 1: -0.5, 163: 35 * 5 - 13.0, 160: -13.0, 255: 0.0}
    return half(1.0) + half(0.5) + scales + qs, weights


def q5_k() -> tuple[list[int], dict[int, float]]:
    scales = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x02]  # sc[0] = 1, sc[7] = 2
    qh = [0] * 32
    qh[4] = 0b1000_0001  # weights 4 and 7 * 32 + 4
    qs = [0] * 128
    qs[3 * 32 + 4] = 0x90  # weight 7 * 32 + 4
    return half(1.0) + half(0.0) + scales + qh + qs, {4: 16.0, 228: 50.0, 5: 0.0, 100: 0.0}


def q6_k() -> tuple[list[int], dict[int, float]]:
    ql, qh, scales = [0] * 128, [0] * 64, [0] * 16
    scales[0], scales[15] = 1, 0x80  # 1 and -128
    ql[0] = 0x05  # weight 0
    ql[64 + 32 + 31] = 0x70  # weight 128 + 96 + 31
    qh[0] = 0b01  # weight 0
    qh[32 + 31] = 0b11 << 6  # weight 255
    weights = {0: 5 + 16 - 32, 1: -32, 16: 0, 255: -128 * (7 + 48 - 32), 254: -128 * -32}
    return ql + qh + scales + half(1.0), weights


@pytest.mark.parametrize(
    "block", [q4_0, q5_0, q8_0, q4_k, q5_k, q6_k], ids=lambda block: block.__name__
)
def test_blocks_written_by_hand(block) -> None:
    data, wanted = block()
    weights = formats.dequantize(block.__name__, bytes(data))
    assert {index: weights[index].item() for index in wanted} == wanted
