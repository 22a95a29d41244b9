"""What sampling parameters refuse. Oracle: the ranges that the documentation states."""

from __future__ import annotations

import math

import pytest

from oxillama_torch import SamplingParams
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import DEFAULT_SAMPLERS
from oxillama_torch.sampling.presets import PRESETS, preset, sampler_order


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("top_k", 10**20),
        ("top_k", 1.5),
        ("typical_p", 1.1),
        ("top_n_sigma", math.inf),
        ("mirostat", 3),
        ("dry_base", 0.5),
        ("repeat_last_n", -1),
        ("xtc_threshold", math.nan),
        ("samplers", ("top_k", "tok_p")),
        ("samplers", ("top_k", "top_k")),
        ("bad_words", ("",)),
        ("bad_words", (5,)),
        ("bad_words", ((1, None),)),
        ("bad_words", ("x",) * 257),
        ("dry_sequence_breakers", ("x" * 1025,)),
        ("allowed_token_ids", ()),
        ("logit_bias", {4: math.nan}),
        ("logit_bias", {4: 1e39}),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param.startswith(name)


def test_lists_become_tuples():
    params = SamplingParams(stop="x", bad_words=["a", [1, 2]], samplers=["top_k"], processors="p")
    assert params.stop == ("x",) and params.bad_words == ("a", (1, 2))
    assert params.samplers == ("top_k",) and params.processors == ("p",)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_changed(name):
    params = preset(name, top_k=7)
    assert params.top_k == 7 and params.top_p == PRESETS[name]["top_p"]
    with pytest.raises(RequestError, match="known: "):
        preset(name + "?")


def test_orders_under_the_names_of_llama_cpp():
    """Letters as ``common_sampler_types_from_chars`` has them; its default is ``edskypmxt``."""
    assert sampler_order("edskypmxt") == PRESETS["llama.cpp"]["samplers"]
    assert sampler_order(["typ_p", "temp", "xtc"]) == ("typical_p", "temperature", "xtc")
    assert sampler_order(DEFAULT_SAMPLERS) == DEFAULT_SAMPLERS
    with pytest.raises(RequestError, match="'z'"):
        sampler_order("kz")


def test_too_long_stop_strings_are_refused_by_length():
    with pytest.raises(RequestError, match="at most 256 texts of 1024 characters, got 16, the "):
        SamplingParams(stop=("s" * 200_000,) * 16)
