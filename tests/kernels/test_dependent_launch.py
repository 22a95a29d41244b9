"""Programmatic dependent launch: asked for or not, what it compiles to, and that nothing races.

Oracles: the disassembler of Triton's wheel, and on a GPU the same kernels one after the other.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from oxillama_torch.bench.cross_compile import Report, cross_compile, table  # noqa: E402
from oxillama_torch.kernels.activation.op import gated  # noqa: E402
from oxillama_torch.kernels.norm.op import rms_norm  # noqa: E402
from oxillama_torch.kernels.quant_matmul.op import quant_matmul  # noqa: E402
from oxillama_torch.kernels.triton_support import pdl_options  # noqa: E402

KERNELS = "oxillama_torch.kernels"
SOURCES = {
    "matmul": (
        f"{KERNELS}.quant_matmul.variants:variants",
        "^(gemv|gemm16|experts|embedding|gated16|dp4a|gated-dp4a)-q8_0$|^segments-dp|^quant",
    ),
    "rms-norm": (f"{KERNELS}.norm.triton_rms_norm:variants", "4096-"),
    "layer-norm": (f"{KERNELS}.norm.triton_layer_norm:variants", "4096-"),
    "activation": (f"{KERNELS}.activation.triton_gated:variants", "silu"),
    "rope": (f"{KERNELS}.rope.triton_rope_store_kv:variants", ""),
    "lora": (f"{KERNELS}.lora.variants:variants", "bf16-3"),
    "attention": (
        f"{KERNELS}.attention.variants:variants",
        "^(prefill-fast|decode-fast-split|decode-invariant|reduce)-g4-d128(-q8_0)?$",
    ),
}
# Prefetching into a cache: what matmuls do with their weights before the wait.
PREFETCH = "CCTL"
# Opcodes of SASS that touch global memory. What may stand before the wait besides arithmetic is a
# kernel's own shared and tensor memory.
GLOBAL = {"LDG", "STG", "LD", "ST", "LDGSTS", "UTMALDG", "UTMASTG", "ATOMG", "RED", "REDG"}


@pytest.fixture
def ask(monkeypatch):
    """Set OXILLAMA_PDL for the launches that follow."""

    def set_to(value: str) -> None:
        monkeypatch.setenv("OXILLAMA_PDL", value)
        pdl_options.cache_clear()

    yield set_to
    pdl_options.cache_clear()


@pytest.mark.parametrize(
    ("value", "capability", "on"),
    [("", (9, 0), False), ("0", (9, 0), False), ("1", (8, 9), False), ("1", (9, 0), True)]
    + [("1", (12, 0), True)],
)
def test_on_where_asked_for_and_possible(value, capability, on, ask, monkeypatch):
    monkeypatch.setattr(f"{KERNELS}.triton_support.INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ask(value)
    found = pdl_options(torch.device("cuda"))
    assert found == ({"USE_PDL": True, "launch_pdl": True} if on else {"USE_PDL": False})


def test_off_on_a_cpu(ask):
    ask("1")
    assert pdl_options(torch.device("cpu")) == {"USE_PDL": False}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SOURCES)
def test_programs_wait_before_they_touch_global_memory(name):
    source, match = SOURCES[name]
    reports = cross_compile(source, [90], match=match, pdl=True)
    assert_waiting(reports)
    for report in reports:
        reads_weights = re.match(r"(gemv|gemm16|gated16|(gated-|segments-)?dp4a)-q", report.name)
        assert (PREFETCH in report.before_wait) == bool(reads_weights), report.name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", [100, 120])
def test_matmuls_wait_on_blackwell(target):
    match = "^(gemm16|dp4a)-q8_0$|^quantize"
    assert_waiting(cross_compile(SOURCES["matmul"][0], [target], match=match, pdl=True))


def assert_waiting(reports: list[Report]) -> None:
    """Every program waits, and before the wait there is no load, no store and no way out."""
    assert reports
    for report in reports:
        assert report.before_wait is not None and report.lets_in, table([report])
        assert not {*report.before_wait} & (GLOBAL | {"EXIT"}), report.before_wait
        assert not report.spills and not report.local_bytes, table([report])


def test_no_wait_unless_asked_for():
    [report] = cross_compile(SOURCES["activation"][0], [90], match="silu")
    assert report.before_wait is None and not report.lets_in


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_a_chain_gives_the_same_bits(numerics, pack, ask):
    """Long chains over memory that is used again and again, as a decoder's layers are."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs sm_90")
    up = pack("Q4_K", 8192, 1024)[0].to("cuda")
    down = pack("Q6_K", 1024, 4096)[0].to("cuda")
    weight = torch.ones(1024, device="cuda")
    start = torch.randn(1, 1024).to(torch.bfloat16).cuda()

    def chain() -> torch.Tensor:
        x = start
        for _ in range(200):
            y = quant_matmul(rms_norm(x, weight, 1e-5, numerics=numerics), up, numerics=numerics)
            y = gated(*y.chunk(2, dim=1), "silu", numerics=numerics)
            x = rms_norm(quant_matmul(y, down, numerics=numerics), weight, 1e-5, numerics=numerics)
        return x.cpu()

    ask("0")
    wanted = chain()
    ask("1")
    assert all(torch.equal(chain(), wanted) for _ in range(5))
