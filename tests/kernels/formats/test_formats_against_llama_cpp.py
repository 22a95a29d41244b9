"""Every format against llama.cpp itself: random blocks of all types in one model, decoded there.

llama.cpp is asked to write the model again in float32; gguf-py, the oracle of the other tests, was
written after its code, and does not decode Q1_0.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from oxillama_torch import LLM, read_gguf
from oxillama_torch.config import demo_model_path
from oxillama_torch.gguf.writer import write_gguf
from oxillama_torch.kernels import formats
from tests.support.blocks import TYPES, assert_same_bits, tame_blocks

pytestmark = pytest.mark.llama_cpp

# Nothing to decode; types of activations, in no file; gguf-py does not know the number of Q2_0.
NOT_WRITTEN = ("F32", "F16", "BF16", "Q8_1", "Q8_K", "Q2_0")
F32_FILE = 0  # LLAMA_FTYPE_ALL_F32
IDS = list(range(300, 340))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """The demo model with random weights: each matrix of the layers of another type."""
    path = tmp_path_factory.mktemp("formats") / "mixed.gguf"
    types = [name for name in TYPES if name not in NOT_WRITTEN]
    turn = itertools.cycle(types)
    with read_gguf(demo_model_path()) as demo:
        tensors = {}
        for name, info in demo.tensors.items():
            if name.startswith("blk.") and len(info.shape) == 2:
                type_name = next(turn)
                blocks = tame_blocks(type_name, *info.shape, seed=len(tensors))
                tensors[name] = (blocks.flatten(1).numpy(), type_name)
            else:
                tensors[name] = (demo.data(name).view(*info.shape[:-1], -1).numpy(), info.type.name)
        write_gguf(path, demo.metadata, tensors)
    with read_gguf(path) as model:
        assert {info.type.name for info in model.tensors.values()} >= set(types)
    return path


@pytest.fixture(scope="module")
def widened(mixed) -> Path:
    """The same in float32, by llama.cpp."""
    import llama_cpp

    path = mixed.with_name("widened.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = F32_FILE, True, 1
    assert llama_cpp.llama_model_quantize(bytes(mixed), bytes(path), params) == 0
    return path


def test_weights_have_the_same_bits(mixed, widened):
    with read_gguf(mixed) as ours, read_gguf(widened) as theirs:
        for name, info in ours.tensors.items():
            got = formats.dequantize(info.type, ours.data(name))
            assert theirs.tensors[name].type.name == "F32"
            assert_same_bits(got, theirs.data(name).view(torch.float32))


def test_logits_are_those_of_the_float32_model_in_llama_cpp(mixed, widened):
    import llama_cpp

    llama = llama_cpp.Llama(
        str(widened), n_ctx=len(IDS), logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip
    llama.eval(IDS)
    theirs = torch.tensor(llama.scores[: len(IDS)])
    llama.close()
    with LLM(mixed, numerics="invariant") as llm:
        ours = llm.logits(IDS)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())
