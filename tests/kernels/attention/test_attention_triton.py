"""The Triton attention kernels: interpreted on a CPU, compiled where there is a GPU.

Oracle: plain softmax attention in float64 without pages. Tiles are set small here, so that a few
programs meet every border; the tiles used on a GPU are compiled in test_cross_compile_attention.py.
"""

from __future__ import annotations

import functools

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.attention.op import attention
from oxillama_torch.kernels.attention.triton_backend import (
    Tiling,
    fast_tiling,
    invariant_tiling,
    launch,
)
from oxillama_torch.kernels.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

SMALL = Tiling(block_m=16, block_n=16, segment=32, segmented=True, num_warps=2, num_stages=2)
WAYS = {
    "one-pass": functools.partial(launch, tiling=SMALL, split=False),
    "split": functools.partial(launch, tiling=SMALL, split=True),
    "unsegmented": functools.partial(launch, tiling=Tiling(16, 32, 64, False, 2, 2), split=False),
}
HEADS = [  # (HQ, HKV), (D, DV): groups 1, 4 and 7, of which 16 rows hold 16, 4 and 2 tokens
    ((2, 2), (32, 32)),
    ((4, 1), (80, 24)),
    ((7, 1), (16, 64)),
]
FLAGS = {
    "plain": {},
    "window": {"window": 20},
    "slopes": {"slopes": True},
    "all": {"window": 37, "softcap": 3.0, "sinks": True, "slopes": True},
}
# Around the borders of KV tiles, segments, pages and query tiles.
SPANS = [(0, 1), (15, 16), (16, 17), (31, 33), (30, 65), (70, 71)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(("heads", "dims"), HEADS)
def test_equals_plain_attention(way, heads, dims, flags, flagged, make_request, part, run, truth):
    parts = [part(make_request(stop, heads, dims), start, stop) for start, stop in SPANS]
    flags = flagged(flags, heads[0])
    for got, piece in zip(run(WAYS[way], parts, **flags), parts):
        torch.testing.assert_close(got.double(), truth(piece, **flags), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["one-pass", "split"])
@pytest.mark.parametrize("page_size", [4, 16, 64])
def test_page_sizes(way, page_size, make_request, part, run, truth):
    piece = part(make_request(75, (4, 2), (32, 32)), 60, 75)
    (got,) = run(WAYS[way], [piece], layout={"page_size": page_size, "extra_width": 3})
    torch.testing.assert_close(got.double(), truth(piece), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, pages_dtype, make_request, part, run, truth):
    request = make_request(40, (4, 2), (32, 32), torch.bfloat16)
    request = type(request)(request.q.to(dtype), request.k, request.v)
    piece = part(request, 30, 40)
    (got,) = run(WAYS["one-pass"], [piece], layout={"pages_dtype": pages_dtype})
    assert got.dtype == dtype
    # Weights are rounded to the dtype of the dots; the interpreter truncates to bfloat16.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), truth(piece), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("flags", [FLAGS["plain"], FLAGS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize(("heads", "dims"), HEADS[1:])
def test_bits_do_not_depend_on_chunks_split_batch_or_pages(
    heads, dims, flags, flagged, make_request, part, run
):
    request, other = make_request(70, heads, dims), make_request(36, heads, dims)
    flags = flagged(flags, heads[0])
    (whole,) = run(WAYS["one-pass"], [part(request, 0, 70)], **flags)
    cuts = [0, 5, 22, 39, 56, 68, 69, 70]
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        way = WAYS["split" if number % 2 else "one-pass"]
        parts = [part(other, 35, 36), part(request, start, stop), part(other, 3, 9)]
        layout = {"page_size": (16, 64)[number % 2], "seed": number, "extra_width": number}
        got = run(way, parts, layout=layout, **flags)[1]
        assert torch.equal(got, whole[start:stop]), f"tokens {start} to {stop}"


def test_bits_do_not_depend_on_a_batch_of_sixteen(make_request, part, run):
    ends = torch.linspace(1, 60, 16).int().tolist()
    parts = [part(make_request(end, (2, 1), (16, 16)), max(0, end - 3), end) for end in ends]
    together = run(WAYS["one-pass"], parts)
    order = torch.randperm(16).tolist()
    permuted = run(WAYS["split"], [parts[row] for row in order], layout={"seed": 1})
    for got, row in zip(permuted, order):
        assert torch.equal(got, together[row])
    for row in (0, 7, 15):
        assert torch.equal(run(WAYS["one-pass"], [parts[row]])[0], together[row])


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
def test_backends_of_the_op(numerics, make_request, part, run, truth):
    parts = [part(make_request(end, (4, 2), (32, 32)), end - 2, end) for end in (2, 70)]
    with use_kernels(f"attention=triton.{numerics}"):
        outs = run(attention, parts, numerics=numerics)
    for got, piece in zip(outs, parts):
        torch.testing.assert_close(got.double(), truth(piece), rtol=1e-5, atol=1e-5)


def test_fast_does_not_serve_invariant_calls(make_request, part, run):
    piece = part(make_request(3, (4, 2), (32, 32)), 0, 3)
    message = "serves fast numerics, not invariant"
    with use_kernels("attention=triton.fast"), pytest.raises(UnsupportedError, match=message):
        run(attention, [piece])


def test_heads_that_do_not_fit_are_refused(make_request, part, run):
    piece = part(make_request(3, (2, 1), (288, 16)), 0, 3)
    message = "head dim of 288; supported: head dims up to 256, .*attention=reference"
    with use_kernels("attention=triton"), pytest.raises(UnsupportedError, match=message):
        run(attention, [piece])


@pytest.mark.parametrize("group", [1, 4, 7, 71])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tilings_hold_a_group_and_whole_segments(group, dim, dtype):
    tilings = [invariant_tiling(group, dtype)]
    for large in (False, True):
        tilings += [fast_tiling(group, dim, dtype, length, large) for length in (1, 8, 500)]
    for tiling in tilings:
        assert tiling.block_m >= group
        assert tiling.segment % tiling.block_n == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "dims"), [((32, 8), (128, 128)), ((8, 8), (64, 64))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_invariant_bits_on_a_gpu(heads, dims, dtype, make_request, part, run):
    request, other = make_request(1500, heads, dims, dtype), make_request(700, heads, dims, dtype)
    tiling = invariant_tiling(heads[0] // heads[1], dtype)
    (whole,) = run(functools.partial(launch, tiling=tiling, split=False), [part(request, 0, 1500)])
    for split in (False, True):
        way = functools.partial(launch, tiling=tiling, split=split)
        for start, stop in ((0, 17), (511, 512), (900, 1400), (1499, 1500)):
            got = run(way, [part(other, 699, 700), part(request, start, stop)])[1]
            assert torch.equal(got, whole[start:stop]), f"split {split}, tokens {start} to {stop}"
