"""Models of GGUF files in HuggingFace's form.

Oracle: the engine's own logits for the same file, which other tests hold to transformers; and the
HuggingFace model that the file was written from, whose weights must come back as they were.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM

from oxillama_torch import LLM
from oxillama_torch.config import demo_model_path
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.export_hf import export_hf

# longer than the original context (64) of the llama3 and yarn models
PROMPT = torch.randint(0, 389, (100,), generator=torch.Generator().manual_seed(1)).tolist()

DENSE = [
    "llama",
    "llama-biases",
    "llama-tied",
    "llama-llama3",
    "llama-linear",
    "llama-yarn",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
]


def exported(path):
    with read_gguf(path) as gguf:
        config, state = export_hf(gguf)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(state)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def assert_close(got, wanted, tolerance=1e-4):
    error = (got - wanted).abs().max() / wanted.std()
    assert error < tolerance, f"logits differ by {error:.1e} standard deviations"


@pytest.mark.parametrize("arch", DENSE)
def test_logits_equal_the_engine_s(arch, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny(arch, path, type_name="Q8_0")
    with LLM(path, device="cpu", dtype="float32") as llm:
        ours = torch.as_tensor(llm.logits(PROMPT))
    assert_close(logits(exported(path), PROMPT), ours)


@pytest.mark.parametrize("arch", DENSE)
def test_every_weight_comes_back(arch, tmp_path):
    """Bit for bit: nothing is computed but the quantization, which the oracle has been through."""
    path = tmp_path / "tiny.gguf"
    oracle, model = write_tiny(arch, path, type_name="Q5_1"), exported(path)
    wanted, got = oracle.state_dict(), model.state_dict()
    assert type(model) is type(oracle) and wanted.keys() == got.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert got["model.norm.weight"].dtype == torch.float32


def test_the_demo_model():
    with LLM(device="cpu", dtype="float32") as llm:
        ids = llm.tokenize(
            "def read(path):\n    with open(path) as file:\n        return file.read()"
        )
        ours = torch.as_tensor(llm.logits(ids))
    model = exported(demo_model_path())
    assert_close(logits(model, ids), ours)
    assert model.config.eos_token_id == ours.shape[1] - 3


@pytest.mark.parametrize(
    ("arch", "named"),
    [("mixtral", "experts"), ("mistral", "sliding window"), ("granite", "'granite'")],
)
def test_what_cannot_be_said_is_named(arch, named, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf")
    with read_gguf(tmp_path / "tiny.gguf") as gguf, pytest.raises(UnsupportedError, match=named):
        export_hf(gguf)
