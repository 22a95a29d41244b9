"""Bad words and breakers as tokens, on the demo model's own vocabulary.

Oracle: the texts themselves: what is made of tokens must spell them. Breakers are compared with
llama.cpp's in test_against_llama_cpp.py.
"""

from __future__ import annotations

import pytest
from scripted_model import ScriptedModel

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.sampling.words import Words, has_texts


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", max_batch_size=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def words(llm):
    return Words(llm.tokenizer)


@pytest.mark.parametrize("text", ["\n", ":", "self.", '"""', "return x", "é"])
def test_breakers_hold_or_overlap_the_text(llm, words, text):
    tokenizer = llm.tokenizer
    params = SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=(text,))
    breakers = words.resolve(params).dry_sequence_breakers
    heads = {breaker[0] for breaker in breakers}
    wanted = text.encode()
    for breaker in breakers:
        spelled = b"".join(map(tokenizer.token_bytes, breaker))
        assert wanted in spelled
    for token_id in range(tokenizer.vocab_size):
        if wanted in tokenizer.token_bytes(token_id):
            assert (token_id,) in breakers
        elif tokenizer.token_bytes(token_id).endswith(wanted[:1]):
            assert token_id in heads or not wanted[1:].isascii()
    assert len(set(breakers)) == len(breakers)


def test_bad_words_are_spelled_with_and_without_a_space(llm, words):
    params = words.resolve(SamplingParams(bad_words=("return", (7, 8))))
    texts = [llm.tokenizer.decode(ids) for ids in params.bad_words[:-1]]
    assert texts == ["return", " return"] and params.bad_words[-1] == (7, 8)


def test_no_bad_word_is_ever_completed(llm):
    """The unconstrained model does write them."""
    bad = ("self", "return", "if")
    params = SamplingParams(seed=2, max_tokens=120, n=4, temperature=0.7)
    free = llm.generate("class Parser:\n    def parse(self):\n", params)
    assert any(word in c.text for c in free for word in bad)
    params = SamplingParams(seed=2, max_tokens=120, n=4, temperature=0.7, bad_words=bad)
    encode = llm.tokenizer.encode
    spelled = [encode(form, add_special=False) for word in bad for form in (word, " " + word)]
    for completion in llm.generate("class Parser:\n    def parse(self):\n", params):
        ids = completion.token_ids
        for word in spelled:
            assert not any(ids[i : i + len(word)] == word for i in range(len(ids)))


def test_texts_need_a_vocabulary(llm):
    assert not has_texts(SamplingParams(bad_words=((1, 2),)))
    assert not has_texts(SamplingParams()), "breakers matter once DRY is on"
    params = SamplingParams(seed=1, dry_multiplier=1.0)
    assert has_texts(params)
    engine = Engine(ScriptedModel(), EngineConfig(device="cpu"))
    with pytest.raises(UnsupportedError, match="vocabulary"):
        engine.tokenized(GenerationRequest(prompt_token_ids=(1,), params=params))


def test_texts_that_have_no_tokens_are_refused(words):
    for params in (
        SamplingParams(bad_words=("\ud800",)),
        SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=("\ud800",)),
    ):
        with pytest.raises(RequestError, match="surrogate") as refused:
            words.resolve(params)
        assert refused.value.param in ("bad_words", "dry_sequence_breakers")


def test_too_many_breakers_are_refused(words):
    texts = tuple(f"word {number}" for number in range(33))
    with pytest.raises(RequestError, match="at most 32"):
        words.resolve(SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=texts))
