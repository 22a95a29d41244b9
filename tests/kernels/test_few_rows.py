"""Compiled kernels of few rows on a CPU. Oracle: the references, and torch's own attention."""

from __future__ import annotations

import shutil

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.activation.op import gated
from oxillama_torch.kernels.attention import compiled as compiled_attention
from oxillama_torch.kernels.attention.op import attention
from oxillama_torch.kernels.few_rows import MAX_ROWS, Readiness
from oxillama_torch.kernels.norm.op import rms_norm
from oxillama_torch.kernels.registry import Call, use_kernels
from oxillama_torch.kernels.rope.op import rope_store_kv

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(900),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def both(op, run):
    """What ``compiled`` and the reference make of the same."""
    results = []
    for backend in ("compiled", "reference"):
        with use_kernels(f"{op}={backend}"):
            results.append(run())
    return results


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, MAX_ROWS])
@pytest.mark.parametrize("features", [1, 7, 64, 300])
@pytest.mark.parametrize("residual", [False, True])
def test_norms(rows, features, residual):
    x, extra = torch.randn(2, rows, features)
    extra = extra if residual else None
    weight = torch.rand(features)
    got, wanted = both(
        "rms_norm", lambda: rms_norm(x, weight, 1e-5, residual=extra, numerics="fast")
    )
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations_of_the_halves_of_a_product(rows, kind):
    gate, up = (torch.randn(rows, 2 * 77) * 8).chunk(2, dim=1)
    got, wanted = both("gated", lambda: gated(gate, up, kind, numerics="fast"))
    torch.testing.assert_close(got, wanted, **CLOSE)


def rotation(tokens, *, style, pairs, heads, kv_heads, dim, value_dim, dtype, slots, normed):
    generator = torch.Generator().manual_seed(tokens)
    fused = torch.randn(tokens, heads * dim + kv_heads * (dim + value_dim), generator=generator)
    widths = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    q, k, v = fused.split(widths, dim=1)
    norm = torch.rand(dim, generator=generator) if normed else None

    def run():
        pages = [torch.full((4, 8, kv_heads, d), 7.0, dtype=dtype) for d in (dim, value_dim)]
        rotated = rope_store_kv(
            q.unflatten(1, (heads, dim)),
            k.unflatten(1, (kv_heads, dim)),
            v.unflatten(1, (kv_heads, value_dim)),
            torch.arange(tokens) * 1000 + 3,
            1.0 / 10000 ** (torch.arange(pairs) / pairs),
            1.1,
            style,
            *pages,
            torch.tensor(slots),
            q_norm=norm,
            k_norm=norm,
            norm_eps=1e-6,
            numerics="fast",
        )
        return rotated, *pages

    return run


@needs_compiler
@pytest.mark.parametrize(
    ("style", "pairs", "dims", "dtype", "normed"),
    [
        ("norm", 8, (16, 16), torch.float32, False),
        ("neox", 3, (10, 6), torch.float16, True),  # part of a head, values of another size
    ],
)
def test_rotation_and_store(style, pairs, dims, dtype, normed):
    shared = {"style": style, "pairs": pairs, "dim": dims[0], "value_dim": dims[1]}
    shared |= {"dtype": dtype, "normed": normed}
    # The second case does not store its second token.
    for heads, kv_heads, slots in ((4, 2, [31]), (6, 3, [9, -1, 0]), (6, 3, [1, 2])):
        run = rotation(len(slots), heads=heads, kv_heads=kv_heads, slots=slots, **shared)
        got, wanted = both("rope_store_kv", run)
        tolerance = CLOSE if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


def tokens_over_pages(lengths, *, heads, kv_heads, dims, dtype=torch.float32, window=None):
    """One token of each request; pages lie about, and what is not theirs is NaN."""
    generator = torch.Generator().manual_seed(len(lengths))
    size, (dim, value_dim) = 8, dims
    counts = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    k, v = (torch.full((len(order), size, kv_heads, d), torch.nan, dtype=dtype) for d in dims)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, counts)):
        pages = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages, dtype=torch.int32)
        for at in range(length):
            for plane, d in ((k, dim), (v, value_dim)):
                plane[pages[at // size], at % size] = torch.randn(kv_heads, d, generator=generator)
    q = torch.randn(len(lengths), heads, dim, generator=generator)

    def run():
        return attention(
            q, k, v, table,
            torch.arange(len(lengths) + 1, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            scale=0.3, window=window, numerics="fast", max_query_len=1, max_seq_len=max(lengths),
        )  # fmt: skip

    return run


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 8, 13])
def test_tokens_over_pages(window):
    # Slots past the end hold NaN, as memory may: what is hidden must not be multiplied.
    run = tokens_over_pages([1, 8, 9, 30], heads=6, kv_heads=2, dims=(16, 16), window=window)
    got, wanted = both("attention", run)
    torch.testing.assert_close(got, wanted, **CLOSE)


@needs_compiler
def test_values_of_another_size_and_dtype():
    run = tokens_over_pages([17], heads=3, kv_heads=3, dims=(24, 10), dtype=torch.bfloat16)
    got, wanted = both("attention", run)
    torch.testing.assert_close(got, wanted, **CLOSE)


@needs_compiler
def test_what_a_program_does_not_do_is_torchs_business(monkeypatch):
    def refuse(form):
        raise AssertionError(form)

    monkeypatch.setattr(compiled_attention, "_program", refuse)
    q, pages = torch.randn(3, 2, 16), torch.randn(2, 2, 8, 2, 16)

    def run():
        return attention(
            q, *pages,
            torch.tensor([[1, 0]], dtype=torch.int32),
            torch.tensor([0, 3], dtype=torch.int32),
            torch.tensor([11], dtype=torch.int32),
            scale=0.25, numerics="fast", max_query_len=3, max_seq_len=11,
        )  # fmt: skip

    got, wanted = both("attention", run)
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("op", ["rms_norm", "gated", "rope_store_kv", "attention"])
@pytest.mark.parametrize(
    "call",
    [
        Call("cpu", torch.float32, "invariant"),
        Call("cpu", torch.float32, "fast", m=MAX_ROWS + 1),
        Call("cpu", torch.bfloat16, "fast"),
        Call("cuda", torch.float32, "fast"),
    ],
)
def test_refused_calls(op, call):
    kernel = next(k for k, _ in registry.candidates(op, call) if k.backend == "compiled")
    assert kernel.refuse(call)
    with use_kernels(f"{op}=compiled"), pytest.raises(UnsupportedError, match="asked for"):
        registry.select(op, call)


class TestReadiness:
    """Nothing is compiled here."""

    call = Call("cpu", torch.float32, "fast")

    @pytest.fixture(autouse=True)
    def with_compiler(self, monkeypatch):
        monkeypatch.setattr("oxillama_torch.kernels.few_rows.compiler", lambda: "/usr/bin/c++")

    def test_a_program_is_chosen_once_it_agrees(self):
        readiness = Readiness("gated")
        assert "not compiled" in readiness.not_by_default(self.call)
        assert readiness.wanted(large=True) and not readiness.wanted(large=False)
        readiness.prepare("a", lambda: torch.ones(3), lambda: torch.ones(3))
        assert readiness.not_by_default(self.call) is None
        # Then small models that come later are served too: theirs is compiled when they load.
        assert readiness.wanted(large=False)

    def test_one_that_does_not_agree_is_refused(self, caplog):
        readiness = Readiness("gated")
        readiness.prepare("a", lambda: torch.ones(3), lambda: torch.full((3,), 1.01))
        assert "does not agree" in readiness.cannot(self.call)
        assert "does not agree" in caplog.text
        assert not readiness.wanted(large=True)

    def test_one_that_does_not_compile_is_refused(self):
        def broken():
            raise RuntimeError("no such header\nand more")

        readiness = Readiness("gated")
        readiness.prepare("a", broken, lambda: torch.ones(3))
        assert readiness.cannot(self.call) == "compiling failed: no such header"

    def test_rules_are_heard(self):
        readiness = Readiness("gated")
        with use_kernels("gated=reference"):
            assert not readiness.wanted(large=True)
        with use_kernels("gated=compiled"):
            assert readiness.wanted(large=False)
