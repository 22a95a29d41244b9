"""kernels/attention/reference.py. Oracle: plain softmax attention in float64 without pages."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.attention import reference
from oxillama_torch.kernels.attention.op import attention
from oxillama_torch.kernels.attention.reference import attention as attend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HEADS = [  # (HQ, HKV), (D, DV): groups 1, 4, 7, 2, 12 and heads of the usual and unusual dims
    ((3, 3), (32, 32)),
    ((8, 2), (64, 64)),
    ((7, 1), (80, 80)),
    ((4, 2), (128, 128)),
    ((2, 1), (256, 256)),
    ((12, 1), (24, 8)),
]
FLAGS = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "slopes": {"slopes": True},
    "all": {"window": 33, "softcap": 3.0, "sinks": True, "slopes": True},
}
# Around the borders of KV tiles (32), pages (16) and query tiles.
SPANS = [(0, 1), (0, 31), (31, 32), (32, 33), (0, 33), (15, 16), (16, 18), (63, 65), (7, 150)]


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize(("heads", "dims"), HEADS)
def test_equals_plain_attention(heads, dims, flags, flagged, make_request, part, run, truth):
    parts = [part(make_request(stop, heads, dims), start, stop) for start, stop in SPANS]
    flags = flagged(flags, heads[0])
    for got, piece in zip(run(attend, parts, **flags), parts):
        torch.testing.assert_close(got.double(), truth(piece, **flags), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_the_result_only(dtype, pages_dtype, make_request, part, run, truth):
    # bfloat16 values are exact in the other dtypes' range but for float16's subnormals.
    request = make_request(70, (4, 2), (32, 32), torch.bfloat16)
    request = type(request)(request.q.to(dtype), request.k, request.v)
    piece = part(request, 20, 70)
    (got,) = run(attend, [piece], layout={"pages_dtype": pages_dtype})
    assert got.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(got.double(), truth(piece), rtol=eps, atol=eps)


def in_chunks(run, part, request, size, **arguments):
    length = len(request.q)
    chunks = [(start, min(start + size, length)) for start in range(0, length, size)]
    outs = [run(attend, [part(request, *chunk)], **arguments)[0] for chunk in chunks]
    return torch.cat(outs)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("flags", [FLAGS["plain"], FLAGS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize(("heads", "dims"), HEADS)
def test_bits_do_not_depend_on_the_chunks(heads, dims, flags, flagged, make_request, part, run):
    request = make_request(69, heads, dims)
    flags = flagged(flags, heads[0])
    (whole,) = run(attend, [part(request, 0, 69)], **flags)
    for size in (1, 5, 17):
        got = in_chunks(run, part, request, size, layout={"seed": size}, **flags)
        assert torch.equal(got, whole), f"chunks of {size}"


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_the_batch(heads, window, threads, make_request, part, run):
    """Sixteen requests, decoding and prefilling, with contexts from 1 to 300."""
    ends = torch.linspace(1, 300, 16).int().tolist()
    requests = [make_request(end, heads, (32, 48)) for end in ends]
    parts = [
        part(request, end - 1 if row % 3 else end // 2, end)
        for row, (request, end) in enumerate(zip(requests, ends))
    ]
    together = run(attend, parts, window=window)
    for got, piece in zip(together, parts):
        (alone,) = run(attend, [piece], window=window, layout={"seed": 1})
        assert torch.equal(got, alone)
    order = torch.randperm(16).tolist()
    for got, row in zip(run(attend, [parts[row] for row in order], window=window), order):
        assert torch.equal(got, together[row])


@pytest.mark.parametrize("layout", [
    {"page_size": 32}, {"page_size": 64}, {"page_size": 4}, {"seed": 7}, {"extra_width": 9},
])  # fmt: skip
def test_bits_do_not_depend_on_the_pages(layout, make_request, part, run):
    parts = [part(make_request(90, (4, 2), (32, 32)), start, 90) for start in (0, 50, 89)]
    for got, want in zip(run(attend, parts, layout=layout), run(attend, parts)):
        assert torch.equal(got, want)


def test_bits_do_not_depend_on_the_size_of_computed_groups(make_request, part, run, monkeypatch):
    parts = [part(make_request(100, (4, 2), (32, 32)), 0, 100) for _ in range(3)]
    want = run(attend, parts)
    monkeypatch.setattr(reference, "_GROUP_BYTES", 1)
    assert all(torch.equal(a, b) for a, b in zip(run(attend, parts), want))


def test_a_request_without_query_tokens_is_passed_over(make_request, part, run, truth):
    request = make_request(40, (4, 2), (32, 32))
    none, some = part(request, 40, 40), part(request, 39, 40)
    outs = run(attention, [none, some, none])
    assert [len(out) for out in outs] == [0, 1, 0]
    torch.testing.assert_close(outs[1].double(), truth(some), rtol=1e-5, atol=1e-5)


def operands() -> dict:
    return {
        "q": torch.ones(3, 4, 8),
        "k_pages": torch.ones(5, 16, 2, 8),
        "v_pages": torch.ones(5, 16, 2, 8),
        "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "query_start": torch.tensor([0, 1, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 2], dtype=torch.int32),
        "scale": 1.0,
        "max_query_len": 2,
        "max_seq_len": 20,
    }


def test_no_tokens():
    nothing = {"q": torch.empty(0, 4, 8), "max_query_len": 0, "max_seq_len": 0}
    assert attention(**(operands() | nothing)).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 32)}, r"q: got \(3, 32\), wanted \(T, HQ, D\)"),
        ({"q": torch.ones(3, 3, 8)}, "q: got 3 heads, wanted a multiple of 2"),
        ({"q": torch.ones(3, 4, 8).int()}, "q: got torch.int32"),
        ({"q": torch.ones(4, 3, 8).transpose(0, 1)}, "q: got .* strides .*wanted a contiguous"),
        ({"k_pages": torch.ones(5, 16, 2, 4)}, r"k_pages: got .*wanted \(P, S, HKV, 8\)"),
        ({"v_pages": torch.ones(4, 16, 2, 8)}, r"v_pages: got .*wanted \(5, 16, 2, DV\)"),
        ({"v_pages": torch.ones(5, 16, 2, 8).half()}, "v_pages: got torch.float16, wanted"),
        ({"k_pages": torch.ones(5, 12, 2, 8), "v_pages": torch.ones(5, 12, 2, 8)}, "power of two"),
        ({"page_table": torch.zeros(2, 3)}, "page_table: got torch.float32"),
        ({"query_start": torch.zeros(2, dtype=torch.int32)}, r"query_start: got .*int32 \(3,\)"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, "seq_lens: got torch.int64"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "seq_lens: got meta"),
        ({"max_seq_len": 49}, "max_seq_len: got 49, wanted 2 to 3 pages of 16"),
        ({"max_query_len": 0}, "max_query_len: got 0"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"window": 0}, "window: got 0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"sinks": torch.ones(2)}, r"sinks: got torch.float32 \(2,\), wanted .*\(4,\)"),
        ({"slopes": torch.ones(4).half()}, r"slopes: got torch.float16 \(4,\)"),
    ],
)
def test_bad_operands_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**(operands() | change))
