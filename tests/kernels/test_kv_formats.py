"""Packed keys and values. Oracles: gguf-py's quantization, torch's float8, attention in float64."""

from __future__ import annotations

import functools

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.attention.op import attention
from oxillama_torch.kernels.kv_formats import decode, encode, find, raw
from oxillama_torch.kernels.registry import use_kernels
from oxillama_torch.kernels.rope.op import rope_store_kv

BYTES = ("fp8", "q8_0", "q4_0")
D, DV, HKV, S = 96, 32, 2, 16  # neither a power of two nor alike
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Error of the output, relative to its norm, beyond which a format has not kept its bits.
BOUNDS = {"f32": 1e-6, "f16": 1e-3, "bf16": 6e-3, "fp8": 0.05, "q8_0": 0.01, "q4_0": 0.15}


def awkward_rows() -> torch.Tensor:
    """Of many sizes: ties, a group of zeros, subnormal float8, what float8 does not reach."""
    random = torch.Generator().manual_seed(5)
    rows = torch.randn(64, D, generator=random) * torch.logspace(-4, 3, 64)[:, None]
    rows[0, :32] = 0
    rows[1, :32] = torch.arange(32) - 15.5
    rows[2, :8] = torch.tensor([448, 463, 465, -6e4, 2**-10, 3 * 2**-10, -(2**-9), 17.0])
    rows[3, 32:64] = torch.tensor([-3.0, 3.0] * 16)
    rows[4, 32:64] = torch.tensor([3.0, -3.0] * 16)
    return rows


def expected(rows: torch.Tensor, name: str) -> torch.Tensor:
    """What is read back from rows that were written."""
    if not name.startswith("q"):
        format = find(name, torch.float32)
        return (rows.clamp(-448, 448) if name == "fp8" else rows).to(format.dtype).float()
    kind = gguf.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(dequantize(quantize(rows.numpy(), kind), kind))


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_packed_as_gguf_py_quantizes(name):
    format = find(name, torch.float32)
    packed = encode(awkward_rows(), format)
    assert packed.shape == (64, format.row(D)) and packed.dtype == torch.uint8
    assert np.array_equal(decode(packed, format).numpy(), expected(awkward_rows(), name).numpy())


def test_float8_is_cut_and_keeps_nan():
    format = find("fp8", torch.float32)
    got = decode(encode(torch.tensor([1e9, -449.0, torch.nan, 0.0]), format), format)
    assert torch.equal(got[[0, 1, 3]], torch.tensor([448.0, -448.0, 0.0])) and got[2].isnan()


def write(backend: str, name: str, k: torch.Tensor, v: torch.Tensor, **options):
    """k [T, HKV, D] and v [T, HKV, DV] in slots 0, 1, ...: pages of them."""
    format, count = find(name, k.dtype), -(-len(k) // S)
    pages = [
        torch.zeros(count, S, HKV, format.row(x.shape[2]), dtype=format.dtype, device=DEVICE)
        for x in (k, v)
    ]
    inv_freq = options.pop("inv_freq", torch.empty(0)).to(DEVICE)
    at = torch.arange(len(k), device=DEVICE)
    with use_kernels(f"rope_store_kv={backend}"):
        rope_store_kv(
            k.to(DEVICE), k.to(DEVICE), v.to(DEVICE), at, inv_freq, 1.0,
            options.pop("style", "norm"), *pages, at, **options,
        )  # fmt: skip
    return [p.cpu() for p in pages]


def heads(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rows = awkward_rows()
    return rows.view(32, HKV, D).to(dtype), rows[:, 32:64].reshape(32, HKV, DV).contiguous().to(
        dtype
    )


@pytest.mark.interpret
@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_written_as_they_are_read(backend, name, dtype):
    k, v = heads(dtype)
    format = find(name, dtype)
    for x, pages in zip((k, v), write(backend, name, k, v)):
        got = decode(raw(pages).flatten(0, 1)[: len(x)], format)
        want = expected(x.float().flatten(0, 1), name).view_as(x)
        assert torch.equal(got, want)


@pytest.mark.interpret
@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("style", ["norm", "neox"])
@pytest.mark.parametrize("pairs", [16, 48])
@pytest.mark.parametrize("extras", ["plain", "norm and axes"])
def test_rotated_before_they_are_packed(name, style, pairs, extras):
    torch.manual_seed(0)
    k, v = torch.randn(20, HKV, D), torch.randn(20, HKV, DV)
    options = {"inv_freq": 100.0 ** -torch.linspace(0, 1, pairs), "style": style}
    if extras != "plain":
        options["k_norm"] = (torch.rand(D) + 0.5).to(DEVICE)
    plain, packed = (write("triton", kind, k, v, **options)[0] for kind in ("f32", name))
    got = decode(raw(packed), find(name, k.dtype))
    want = expected(plain.view(-1, D), name).view_as(got)
    # Few values round differently where a product is fused; by one step of the format each.
    assert (got != want).float().mean() < 0.01
    torch.testing.assert_close(got, want, rtol=0.13, atol=0.5)


def paged(name: str, stop: int, seed: int, dtype=torch.float32):
    """(q, k pages, v pages, page table) of a request of ``stop`` tokens; poison elsewhere."""
    torch.manual_seed(seed)
    format = find(name, dtype)
    q, k, v = (torch.randn(stop, h, d).to(dtype) for h, d in ((4, D), (HKV, D), (HKV, DV)))
    count = -(-stop // S)
    pages = []
    for x in (k, v):
        pool = torch.full((count + 2, S, HKV, format.row(x.shape[2]) * format.dtype.itemsize), 255)
        pool = pool.to(torch.uint8).view(format.dtype)
        raw(pool)[2:].flatten(0, 1)[:stop] = raw(encode(x, format))
        pages.append(pool)
    truth = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    return q, pages, torch.arange(2, count + 2, dtype=torch.int32)[None], truth


def attend(backend: str, q, pages, table, start: int, stop: int, numerics="invariant"):
    with use_kernels(f"attention={backend}"):
        return attention(
            q[start:stop].contiguous().to(DEVICE), *(p.to(DEVICE) for p in pages),
            table.to(DEVICE), torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE),
            torch.tensor([stop], dtype=torch.int32, device=DEVICE), scale=D**-0.5,
            max_query_len=stop - start, max_seq_len=stop, numerics=numerics,
        ).cpu()  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("backend", ["reference", "gathered", "triton.invariant", "triton.fast"])
def test_attention_over_every_format(name, backend):
    q, pages, table, truth = paged(name, 37, 1)
    numerics = "invariant" if backend in ("reference", "triton.invariant") else "fast"
    got = attend(backend, q, pages, table, 0, 37, numerics).double()
    assert (got - truth).norm() < BOUNDS[name] * truth.norm()
    # Beside the loss of the format, which all share, kernels agree.
    same = attend("reference", q, pages, table, 0, 37).double()
    torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("backend", ["reference", "triton.invariant"])
def test_bits_do_not_depend_on_chunks(name, backend):
    q, pages, table, _ = paged(name, 40, 2)
    whole = attend(backend, q, pages, table, 0, 40)
    for start, stop in ((0, 5), (5, 17), (17, 39), (39, 40)):
        assert torch.equal(attend(backend, q, pages, table, start, stop), whole[start:stop])


@pytest.mark.interpret
@pytest.mark.parametrize("name", BYTES)
def test_split_keys_round_like_one_pass(name):
    from oxillama_torch.kernels.attention.triton_backend import Tiling, launch

    q, pages, table, _ = paged(name, 70, 3)
    way = functools.partial(
        launch, q.to(DEVICE), *(p.to(DEVICE) for p in pages), table.to(DEVICE),
        torch.tensor([0, 70], dtype=torch.int32, device=DEVICE),
        torch.tensor([70], dtype=torch.int32, device=DEVICE), Tiling(16, 16, 32, True, 2, 2),
        scale=1.0, max_query_len=70, max_seq_len=70,
    )  # fmt: skip
    assert torch.equal(way(split=False), way(split=True))


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_heads_that_do_not_fill_groups_are_refused(name):
    with pytest.raises(UnsupportedError, match=f"as {name}, head dim 80; supported: multiples"):
        find(name, torch.float32).row(80)


def test_unknown_format():
    with pytest.raises(UnsupportedError, match="kv_dtype 'q2'.*auto, f32, f16, bf16, fp8"):
        find("q2", torch.float32)
