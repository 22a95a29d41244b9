"""What each step leaves of fixed logits, by llama.cpp's own samplers.

Oracle: llama.cpp (``pip install llama-cpp-python``), through its low-level API.
"""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.sampling.chain import adjust, probabilities
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.presets import preset
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.words import Words
from oxillama_torch.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.llama_cpp

VOCABULARY = 3000
TEXT = [5, 9, 9, 12, 5, 9]


def left_by_llama_cpp(logits: np.ndarray, samplers: list, text=()) -> np.ndarray:
    """float64 [V]: probabilities of what the samplers leave."""
    import llama_cpp

    data = (llama_cpp.llama_token_data * len(logits))()
    for token_id, logit in enumerate(logits.tolist()):
        data[token_id] = llama_cpp.llama_token_data(token_id, logit, 0.0)
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    for sampler in samplers:
        for token_id in text:
            llama_cpp.llama_sampler_accept(sampler, token_id)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        llama_cpp.llama_sampler_free(sampler)
    x = np.full(len(logits), -np.inf)
    for place in range(array.size):
        x[array.data[place].id] = array.data[place].logit
    p = np.exp(x - x.max())
    return p / p.sum()


def ours(logits: torch.Tensor, params: SamplingParams, text=()) -> np.ndarray:
    row = SamplingRow(params, text or [1])
    return probabilities(adjust(logits, [row]), [row])[0].numpy()


CASES = {
    "top_k": ({"top_k": 40}, lambda cpp: [cpp.llama_sampler_init_top_k(40)]),
    "top_p": ({"top_p": 0.9}, lambda cpp: [cpp.llama_sampler_init_top_p(0.9, 0)]),
    "top_p_min_keep": (
        {"top_p": 0.01, "min_keep": 7},
        lambda cpp: [cpp.llama_sampler_init_top_p(0.01, 7)],
    ),
    "min_p": ({"min_p": 0.05}, lambda cpp: [cpp.llama_sampler_init_min_p(0.05, 0)]),
    "typical": ({"typical_p": 0.6}, lambda cpp: [cpp.llama_sampler_init_typical(0.6, 0)]),
    "top_n_sigma": ({"top_n_sigma": 1.5}, lambda cpp: [cpp.llama_sampler_init_top_n_sigma(1.5)]),
    "temperature": ({"temperature": 0.6}, lambda cpp: [cpp.llama_sampler_init_temp(0.6)]),
    "dynatemp": (
        {"dynatemp_range": 0.5, "dynatemp_exponent": 1.3},
        lambda cpp: [cpp.llama_sampler_init_temp_ext(1.0, 0.5, 1.3)],
    ),
    "xtc": (
        {"xtc_probability": 1.0, "xtc_threshold": 0.02},
        lambda cpp: [cpp.llama_sampler_init_xtc(1.0, 0.02, 0, 1)],
    ),
    "penalties": (
        {
            "repeat_last_n": 4,
            "repetition_penalty": 1.5,
            "frequency_penalty": 0.4,
            "presence_penalty": 0.3,
        },
        lambda cpp: [cpp.llama_sampler_init_penalties(VOCABULARY, 4, 1.5, 0.4, 0.3)],
    ),
    "chain": (
        {
            "samplers": ("top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"),
            "top_k": 40,
            "typical_p": 0.95,
            "top_p": 0.9,
            "min_p": 0.02,
            "xtc_probability": 1.0,
            "xtc_threshold": 0.15,
            "temperature": 0.7,
        },
        lambda cpp: [
            cpp.llama_sampler_init_top_k(40),
            cpp.llama_sampler_init_typical(0.95, 0),
            cpp.llama_sampler_init_top_p(0.9, 0),
            cpp.llama_sampler_init_min_p(0.02, 0),
            cpp.llama_sampler_init_xtc(1.0, 0.15, 0, 1),
            cpp.llama_sampler_init_temp(0.7),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_leave_what_llama_cpp_leaves(case):
    import llama_cpp

    changes, samplers = CASES[case]
    for _ in range(5):
        logits = torch.randn(1, VOCABULARY) * 3
        expected = left_by_llama_cpp(logits[0].numpy(), samplers(llama_cpp), TEXT)
        found = ours(logits, SamplingParams(seed=1, **changes), TEXT)
        assert np.array_equal(found > 1e-9, expected > 1e-9)
        assert np.allclose(found, expected, atol=1e-5)


def test_the_preset_is_its_default_chain():
    """Against llama.cpp's samplers with the values of ``common_params_sampling``."""
    import llama_cpp

    logits = torch.randn(1, VOCABULARY) * 3
    chain = [
        llama_cpp.llama_sampler_init_top_k(40),
        llama_cpp.llama_sampler_init_top_p(0.95, 0),
        llama_cpp.llama_sampler_init_min_p(0.05, 0),
        llama_cpp.llama_sampler_init_temp(0.8),
    ]
    expected = left_by_llama_cpp(logits[0].numpy(), chain)
    assert np.allclose(ours(logits, preset("llama.cpp", seed=1)), expected, atol=1e-5)


def test_dry_with_breakers_of_a_real_vocabulary():
    """Breakers as texts: which tokens they are is found in the vocabulary, by both."""
    import llama_cpp

    path = EngineConfig().model_path
    with read_gguf(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    breakers = ["\n", ":", '"', "*", "self.", "return x"]
    params = SamplingParams(
        seed=1, dry_multiplier=0.8, dry_allowed_length=1, dry_sequence_breakers=breakers
    )
    params = Words(tokenizer).resolve(params)
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = (ctypes.c_char_p * len(breakers))(*[text.encode() for text in breakers])
    vocab = llama_cpp.llama_model_get_vocab(llama._model.model)
    phrases = [
        "def f(self",
        "return x",
        " + 1",
        "self.a",
        "\n    ",
        ": x",
        "if x",
        " = y",
        "self.a",
    ]
    rng = random.Random(7)
    for _ in range(25):
        ids = tokenizer.encode("".join(rng.choices(phrases, k=20)), add_special=False)
        logits = torch.zeros(1, tokenizer.vocab_size)
        sampler = llama_cpp.llama_sampler_init_dry(vocab, 0.8, 1.75, 1, 4096, texts, len(breakers))
        expected = left_by_llama_cpp(logits[0].numpy(), [sampler], ids)
        assert np.allclose(ours(logits, params, ids), expected, atol=1e-7)
    llama.close()
