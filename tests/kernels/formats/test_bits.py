"""Bit helpers. Oracle: the layouts of ggml-common.h, bit by bit in plain Python."""

from __future__ import annotations

import torch

from oxillama_torch.kernels.formats.bits import (
    bit_planes,
    float16_at,
    int32_at,
    join_bytes,
    join_scales6,
    split_scales6,
)

BYTES = torch.arange(256, dtype=torch.uint8)


def test_bit_planes_of_every_byte() -> None:
    for position in range(7):
        wanted = [[(byte >> bit & 1) << position for bit in range(8)] for byte in range(256)]
        assert bit_planes(BYTES.view(256, 1), position).tolist() == wanted
    assert bit_planes(BYTES.view(2, 128), 4).shape == (2, 1024)


def get_scale_min_k4(j: int, q: list[int]) -> tuple[int, int]:
    """ggml-quants.c, transcribed."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def test_scales6_against_ggml_and_back() -> None:
    packed = torch.randint(0, 256, (50, 12), dtype=torch.uint8)
    scales = split_scales6(packed)
    for row, got in zip(packed.tolist(), scales.tolist()):
        sc, m = zip(*(get_scale_min_k4(j, row) for j in range(8)))
        assert got == [*sc, *m]
    assert torch.equal(join_scales6(scales), packed)


def test_fields_at_odd_places() -> None:
    blocks = torch.tensor([[7, 7, 0x00, 0x3C, 0x01, 0x00, 0x00, 0x80]], dtype=torch.uint8)
    assert float16_at(blocks, 2).tolist() == [[1.0]]
    assert int32_at(blocks, 4).tolist() == [[1 - (1 << 31)]]
    assert int32_at(blocks[:, 1:], 3).tolist() == [[1 - (1 << 31)]]
    assert join_bytes(float16_at(blocks, 2), int32_at(blocks, 4)).tolist() == [
        blocks[0, 2:].tolist()
    ]
