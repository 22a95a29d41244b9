"""Decoders with every op in Triton: interpreted on the CPU, compiled on a GPU.

Oracle: the same decoder with the reference kernels; on a GPU also transformers.
"""

from __future__ import annotations

import pytest
import torch
from paged_runner import PagedRunner
from tiny_models import TINY_MODELS, write_tiny

from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels.registry import use_kernels
from oxillama_torch.models.loader import load_model

OPS = (
    "quant_matmul", "quant_matmul_experts", "embedding", "rms_norm", "rope_store_kv", "attention",
    "gated",
)  # fmt: skip
TRITON = ",".join(f"{op}=triton" for op in OPS)
LONG = torch.randint(0, 389, (100,), generator=torch.Generator().manual_seed(1)).tolist()
IDS = LONG[:21]
SMALL = {"num_hidden_layers": 1, "hidden_size": 128}
# fast kernels round activations to 8 bits or multiply in half precision
FAST_TOLERANCE = 0.05


def run(decoder):
    """A chunk, another request's prompt beside a token, and one token more."""
    runner = PagedRunner(decoder)
    first = runner.step({"a": IDS[:9]})
    second = runner.step({"b": IDS[10:], "a": IDS[9:10]})
    return torch.cat([first["a"], second["a"], second["b"], runner.run("a", IDS[10:11])])


def load(path, **options):
    with read_gguf(path) as file:
        return load_model(file, **options)


def relative_error(got, wanted):
    """Root mean square of the difference over that of the logits."""
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt()


@pytest.mark.interpret
@pytest.mark.parametrize("arch", ["llama-yarn", "qwen3", "mixtral", "mistral"])
def test_invariant_kernels_equal_the_reference_and_one_another(arch, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0", **SMALL)
    decoder = load(tmp_path / "tiny.gguf")
    wanted = run(decoder)
    with use_kernels(TRITON):
        got = run(decoder)
        alone = PagedRunner(decoder).run("a", IDS[:11])
    assert relative_error(got, wanted) < 1e-5
    assert torch.equal(torch.cat([got[:10], got[-1:]]), alone)


@pytest.mark.interpret
@pytest.mark.parametrize("arch", ["llama-yarn", "mixtral"])
def test_fast_kernels_are_close_to_the_reference(arch, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0", **SMALL)
    wanted = run(load(tmp_path / "tiny.gguf"))
    with use_kernels(TRITON):
        got = run(load(tmp_path / "tiny.gguf", numerics="fast"))
    assert relative_error(got, wanted) < FAST_TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("arch", TINY_MODELS)
def test_on_a_gpu(arch, tmp_path):
    oracle = write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0")
    with torch.no_grad():
        wanted = oracle(torch.tensor([LONG])).logits[0]
    for numerics, tolerance in (("invariant", 1e-4), ("fast", FAST_TOLERANCE)):
        decoder = load(tmp_path / "tiny.gguf", device="cuda", numerics=numerics)
        got = PagedRunner(decoder).run("a", LONG)
        assert relative_error(got.cpu(), wanted) < tolerance, numerics


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3moe"])
def test_chunks_give_the_same_bits_on_a_gpu(arch, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q4_0")
    decoder = load(tmp_path / "tiny.gguf", device="cuda", dtype=torch.bfloat16)
    whole = PagedRunner(decoder).run("a", LONG)
    for chunk in (1, 5, 17):
        assert torch.equal(PagedRunner(decoder).run("a", LONG, chunk), whole), f"chunks of {chunk}"
