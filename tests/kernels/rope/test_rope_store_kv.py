"""kernels/rope. Oracles: complex multiplication in float64; transformers' llama for neox."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from oxillama_torch.kernels.registry import use_kernels
from oxillama_torch.kernels.rope.op import rope_store_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
HQ, HKV, DV, PAGES, S = 4, 2, 24, 3, 16
# Out of order, with a gap, one token that is not stored, and the far end of a long context.
POSITIONS = torch.tensor([5, 0, 1, 4095, 131071])
SLOTS = torch.tensor([40, 0, -1, 17, 31])
# Rounding to the output's dtype; the interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((HQ, dim), (HKV, dim), (HKV, DV))
    return tuple(torch.randn(len(POSITIONS), *shape).to(dtype) for shape in shapes)


def frequencies(rope_dim: int) -> torch.Tensor:
    return 1.0 / 10000.0 ** (torch.arange(0, rope_dim, 2).float() / rope_dim)


def run(backend, q, k, v, inv_freq, style, mscale=1.0, dtype=None, positions=POSITIONS, **norms):
    """(rotated q, k pages, v pages); pages hold 7 where nothing was written."""
    dtype = dtype or q.dtype
    k_pages, v_pages = (
        torch.full((PAGES, S, HKV, x.shape[2]), 7.0, dtype=dtype, device=DEVICE) for x in (k, v)
    )
    norms = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in norms.items()}
    with use_kernels(f"rope_store_kv={backend}"):
        out = rope_store_kv(
            q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), positions.to(DEVICE), inv_freq.to(DEVICE),
            mscale, style, k_pages, v_pages, SLOTS.to(DEVICE), **norms,
        )  # fmt: skip
    return out.cpu(), k_pages.cpu(), v_pages.cpu()


def rotated(x: torch.Tensor, inv_freq: torch.Tensor, style: str, mscale: float) -> torch.Tensor:
    """Each pair as a complex number times mscale * exp(i angle)."""
    x, pairs = x.double(), len(inv_freq)
    angle = (POSITIONS.float()[:, None] * inv_freq).double()[:, None, :]
    turn = torch.polar(torch.full_like(angle, mscale), angle)
    if style == "norm":
        even, odd = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        turned = torch.view_as_real(torch.complex(even, odd) * turn).flatten(-2)
    else:
        z = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * turn
        turned = torch.cat([z.real, z.imag], dim=-1)
    return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)


def expected_pages(rows: torch.Tensor) -> torch.Tensor:
    pages = torch.full((PAGES * S, *rows.shape[1:]), 7.0, dtype=torch.float64)
    pages[SLOTS[SLOTS >= 0]] = rows.double()[SLOTS >= 0]
    return pages.view(PAGES, S, *rows.shape[1:])


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize(("dim", "rope_dim"), [(32, 32), (80, 80), (64, 16), (20, 12), (16, 0)])
def test_equals_complex_multiplication(backend, style, dim, rope_dim):
    (q, k, v), inv_freq = inputs(dim), frequencies(rope_dim)
    out, k_pages, v_pages = run(backend, q, k, v, inv_freq, style, mscale=1.25)
    assert_near(out, rotated(q, inv_freq, style, 1.25), 5e-6)
    assert_near(k_pages, expected_pages(rotated(k, inv_freq, style, 1.25)), 5e-6)
    assert_near(v_pages, expected_pages(v), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neox_equals_transformers(backend):
    (q, k, v), inv_freq = inputs(64), frequencies(64)
    angles = POSITIONS.float()[:, None] * inv_freq
    cos, sin = (f(torch.cat([angles, angles], dim=-1))[None] for f in (torch.cos, torch.sin))
    want_q, want_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin
    )
    out, k_pages, _ = run(backend, q, k, v, inv_freq, "neox")
    assert_near(out, want_q[0].transpose(0, 1).double(), 2e-6)
    assert_near(k_pages, expected_pages(want_k[0].transpose(0, 1)), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pages_dtype", TOLERANCE)
def test_dtypes(backend, dtype, pages_dtype):
    (q, k, v), inv_freq = inputs(32, dtype), frequencies(32)
    out, k_pages, v_pages = run(backend, q, k, v, inv_freq, "norm", dtype=pages_dtype)
    assert (out.dtype, k_pages.dtype, v_pages.dtype) == (dtype, pages_dtype, pages_dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[pages_dtype])
    assert_near(out, rotated(q, inv_freq, "norm", 1.0), TOLERANCE[dtype])
    assert_near(k_pages, expected_pages(rotated(k, inv_freq, "norm", 1.0)), tolerance)
    assert_near(v_pages, expected_pages(v), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize("rope_dim", [40, 16])
def test_heads_are_normed_before_the_rotation(backend, style, rope_dim):
    (q, k, v), inv_freq = inputs(40), frequencies(rope_dim)
    q_norm, k_norm, eps = torch.randn(40), torch.randn(40), 1e-2
    out, k_pages, v_pages = run(
        backend, q, k, v, inv_freq, style, q_norm=q_norm, k_norm=k_norm, norm_eps=eps
    )
    q, k = (
        torch.nn.functional.rms_norm(x.double(), (40,), w.double(), eps)
        for x, w in ((q, q_norm), (k, k_norm))
    )
    assert_near(out, rotated(q, inv_freq, style, 1.0), 5e-6)
    assert_near(k_pages, expected_pages(rotated(k, inv_freq, style, 1.0)), 5e-6)
    assert_near(v_pages, expected_pages(v), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_fused_projection(backend):
    fused = torch.randn(len(POSITIONS), HQ * 32 + HKV * 32 + HKV * DV)
    q, k, v = fused.split([HQ * 32, HKV * 32, HKV * DV], dim=1)
    q, k, v = q.unflatten(1, (HQ, 32)), k.unflatten(1, (HKV, 32)), v.unflatten(1, (HKV, DV))
    got = run(backend, q, k, v, frequencies(32), "norm")
    want = run(backend, *(x.contiguous() for x in (q, k, v)), frequencies(32), "norm")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_do_not_depend_on_the_batch(backend):
    (q, k, v), inv_freq, many = inputs(20), frequencies(20), torch.tensor([0, 3, 1, 3, 0] * 3)
    small = run("reference", q, k, v, inv_freq, "neox")[0]
    with use_kernels(f"rope_store_kv={backend}"):
        pages = torch.zeros(1, 16, HKV, 20), torch.zeros(1, 16, HKV, DV)
        got = rope_store_kv(
            q[many].to(DEVICE), k[many].to(DEVICE), v[many].to(DEVICE), POSITIONS[many].to(DEVICE),
            inv_freq.to(DEVICE), 1.0, "neox", *(p.to(DEVICE) for p in pages),
            torch.full((15,), -1, device=DEVICE),
        ).cpu()  # fmt: skip
    want = small if backend == "reference" else run(backend, q, k, v, inv_freq, "neox")[0]
    assert torch.equal(got, want[many])


def test_no_tokens():
    q, k, v = (x[:0] for x in inputs(16))
    none = torch.empty(0, dtype=torch.int64)
    pages = torch.zeros(1, 16, HKV, 16), torch.zeros(1, 16, HKV, DV)
    assert rope_store_kv(q, k, v, none, frequencies(16), 1.0, "norm", *pages, none).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "gptj"}, "style: got 'gptj', wanted one of norm, neox"),
        ({"q": torch.ones(5, HQ * 16)}, r"q: got \(5, 64\), wanted \(T, heads, dim\)"),
        ({"k": torch.ones(5, HKV, 8)}, r"k: got \(5, 2, 8\), wanted \(5, HKV, 16\)"),
        ({"v": torch.ones(5, HKV + 1, DV)}, r"v: got \(5, 3, 24\), wanted \(5, 2, DV\)"),
        ({"k": torch.ones(5, HKV, 16).half()}, "k: got torch.float16 on cpu, wanted torch.float32"),
        ({"q": torch.ones(5, 16, HQ).transpose(1, 2)}, "q: got strides .*contiguous heads"),
        ({"positions": POSITIONS.int()}, r"positions: got torch.int32 \(5,\)"),
        ({"slot_mapping": SLOTS[:4]}, r"slot_mapping: got torch.int64 \(4,\)"),
        ({"inv_freq": torch.ones(9)}, r"inv_freq: got torch.float32 \(9,\), .* at most 8"),
        ({"k_pages": torch.ones(1, 16, HKV, 8)}, r"k_pages: got \(1, 16, 2, 8\)"),
        (
            {"v_pages": torch.ones(2, 16, HKV, DV)},
            r"v_pages: got P, S = \(2, 16\), wanted .*\(1, 16\)",
        ),
        ({"q_norm": torch.ones(8)}, r"q_norm: got torch.float32 \(8,\), .*\(16,\)"),
        ({"k_norm": torch.ones(16, device="meta")}, "k_norm: got meta, wanted .*cpu"),
    ],
)
def test_bad_operands_are_named(change, message):
    q, k, v = inputs(16)
    arguments = {
        "q": q, "k": k, "v": v, "positions": POSITIONS, "inv_freq": frequencies(16),
        "mscale": 1.0, "style": "norm", "k_pages": torch.ones(1, 16, HKV, 16),
        "v_pages": torch.ones(1, 16, HKV, DV), "slot_mapping": SLOTS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rope_store_kv(**(arguments | change))
