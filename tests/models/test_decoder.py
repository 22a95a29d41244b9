"""The decoder on GGUF files of tiny random models.

Oracle: transformers with the weights of the same file. Bitwise tests compare a run with another
cut of the same tokens: those are the promise of invariant numerics.
"""

from __future__ import annotations

import pytest
import torch
from paged_runner import PagedRunner
from tiny_models import TINY_MODELS, write_tiny

from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.loader import load_model

# longer than the original context (64) of the llama3 and yarn models and than mistral's window (12)
PROMPT = torch.randint(0, 389, (100,), generator=torch.Generator().manual_seed(1)).tolist()


def load(path, **options):
    with read_gguf(path) as file:
        return load_model(file, **options)


def reference_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def assert_close(got, wanted, tolerance=1e-4):
    error = (got - wanted).abs().max() / wanted.std()
    assert error < tolerance, f"logits differ by {error:.1e} standard deviations"


@pytest.mark.parametrize("arch", TINY_MODELS)
def test_logits_equal_transformers(arch, tmp_path):
    oracle = write_tiny(arch, tmp_path / "tiny.gguf")
    runner = PagedRunner(load(tmp_path / "tiny.gguf"))
    assert_close(runner.run("a", PROMPT), reference_logits(oracle, PROMPT))


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q5_1"])
@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_quantized_logits_equal_transformers_with_the_rounded_weights(arch, type_name, tmp_path):
    oracle = write_tiny(arch, tmp_path / "tiny.gguf", type_name=type_name)
    runner = PagedRunner(load(tmp_path / "tiny.gguf"))
    assert_close(runner.run("a", PROMPT), reference_logits(oracle, PROMPT))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"num_key_value_heads": 4}, id="one-kv-head-per-head"),
        pytest.param(
            {"num_key_value_heads": 1, "num_attention_heads": 3, "hidden_size": 192},
            id="three-heads-to-one-kv-head",
        ),
        pytest.param({"head_dim": 96}, id="heads-wider-than-hidden"),
        pytest.param({"intermediate_size": 100, "hidden_size": 72}, id="odd-sizes"),
    ],
)
def test_other_shapes_equal_transformers(overrides, tmp_path):
    oracle = write_tiny("llama", tmp_path / "tiny.gguf", **overrides)
    runner = PagedRunner(load(tmp_path / "tiny.gguf"))
    assert_close(runner.run("a", PROMPT), reference_logits(oracle, PROMPT))


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param("llama", torch.float32, id="llama-f32"),
        pytest.param("mistral", torch.bfloat16, id="mistral-bf16"),
        pytest.param("qwen3moe", torch.float32, id="qwen3moe-f32"),
        pytest.param("mixtral", torch.bfloat16, id="mixtral-bf16"),
    ],
)
def test_chunks_of_any_size_give_the_same_bits(arch, dtype, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0")
    decoder, ids = load(tmp_path / "tiny.gguf", dtype=dtype), PROMPT[:24]
    whole = PagedRunner(decoder).run("a", ids)
    for chunk in (1, 5, 17):
        assert torch.equal(PagedRunner(decoder).run("a", ids, chunk), whole), f"chunks of {chunk}"
    assert torch.equal(PagedRunner(decoder, page_size=64).run("a", ids), whole), "other pages"


@pytest.mark.parametrize(
    "overrides", [{}, {"intermediate_size": 100, "hidden_size": 72}], ids=["even", "odd-sizes"]
)
@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_a_request_has_the_same_bits_alone_and_in_a_ragged_batch(arch, overrides, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", **overrides)
    decoder = load(tmp_path / "tiny.gguf")
    prompts = {"a": PROMPT[:30], "b": PROMPT[30:37], "c": PROMPT[40:90], "d": PROMPT[90:91]}
    alone = {name: PagedRunner(decoder).run(name, ids) for name, ids in prompts.items()}

    runner = PagedRunner(decoder)
    first = runner.step({"a": prompts["a"][:29], "c": prompts["c"][:13]})
    # decoding, a whole prompt, a chunk and a single token in one step, in another order
    last = runner.step(
        {"d": prompts["d"], "c": prompts["c"][13:], "a": prompts["a"][29:], "b": prompts["b"]}
    )
    together = {name: torch.cat([first[name], last[name]]) for name in ("a", "c")}
    for name, logits in {**last, **together}.items():
        assert torch.equal(logits, alone[name]), f"request {name}"


def test_tokens_without_a_slot_are_computed_but_not_stored(tmp_path):
    write_tiny("llama", tmp_path / "tiny.gguf")
    runner = PagedRunner(load(tmp_path / "tiny.gguf"))
    runner.run("a", PROMPT[:10])
    stored = [tuple(pages.clone() for pages in layer) for layer in runner.kv]
    batch = runner.batch({"a": PROMPT[10:11]})
    batch.slot_mapping.fill_(-1)
    runner.decoder(batch, runner.kv)
    for before, after in zip(stored, runner.kv):
        for old, new in zip(before, after):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_kv_shapes_and_properties(tmp_path):
    write_tiny("llama", tmp_path / "tiny.gguf")
    decoder = load(tmp_path / "tiny.gguf", dtype=torch.bfloat16)
    assert decoder.kv_shapes() == [(2, 32, 32)] * 2
    assert decoder.dtype == torch.bfloat16
    assert decoder.device == torch.device("cpu")
    assert decoder.config.num_layers == 2
    hidden = decoder(PagedRunner(decoder).batch({"a": [1, 2, 3]}), PagedRunner(decoder).kv)
    assert hidden.dtype == torch.bfloat16
    assert decoder.logits(hidden[:0]).shape == (0, 389)
    assert decoder.logits(hidden).dtype == torch.float32
