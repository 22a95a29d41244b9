"""LLM, the offline front door.

Oracles: transformers with the weights of the same tiny file (logits, hidden states, scores); the
demo model's own tokenizer for texts; and each door against the others, since they share one path.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from tiny_models import write_tiny

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.engine.outbox import Outbox
from oxillama_torch.engine.request import FinishEvent, GenerationRequest, TokenEvent
from oxillama_torch.errors import EngineError, GGUFError, RequestError, UnsupportedError
from oxillama_torch.kernels.registry import Call, candidates, registered_ops, use_kernels
from oxillama_torch.sampling.constraint import Constraint

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = "def parse(text):\n"
QUESTION = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", max_batch_size=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(our LLM, transformers model) on the same weights."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    oracle = write_tiny("qwen3", path)
    with LLM(path, device="cpu", inbox_size=4, max_batch_size=2) as llm:
        yield llm, oracle


IDS = [7, 300, 12, 12, 95, 211, 4, 17, 260]


def test_logits_are_those_of_transformers(tiny):
    llm, oracle = tiny
    with torch.no_grad():
        expected = oracle(torch.tensor([IDS])).logits[0]
    logits = llm.logits(IDS)
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_transformers(tiny):
    llm, oracle = tiny
    with torch.no_grad():
        logprobs = oracle(torch.tensor([IDS])).logits[0].log_softmax(-1)
    score = llm.score(IDS)
    expected = [float(logprobs[i, token]) for i, token in enumerate(IDS[1:])]
    assert score.token_ids == IDS and score.logprobs[0] is None
    assert score.logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(sum(expected), abs=1e-3)
    assert llm.score(IDS) == score, "the same on a warm cache"


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max"])
def test_embeddings_pool_the_hidden_states_of_transformers(tiny, pooling):
    llm, oracle = tiny
    with torch.no_grad():
        hidden = oracle.model(torch.tensor([IDS])).last_hidden_state[0]
    expected = {
        "last": hidden[-1],
        "first": hidden[0],
        "mean": hidden.mean(0),
        "max": hidden.max(0).values,
    }[pooling]
    found = llm.embed([IDS, IDS[:3]], pooling, normalize=False)
    assert found.shape == (2, len(expected))
    assert torch.allclose(found[0], expected, rtol=1e-4, atol=1e-4)
    normed = llm.embed(IDS, pooling)
    assert torch.allclose(normed[0], expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_no_texts_have_no_embeddings(tiny):
    llm, oracle = tiny
    assert llm.embed([]).shape == (0, oracle.config.hidden_size)


def test_more_prompts_than_the_inbox_holds(tiny):
    llm, _ = tiny
    prompts = [[5 + i, 6, 7] for i in range(20)]
    completions = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3))
    assert [c.prompt_token_ids for c in completions] == prompts
    assert completions == [
        llm.generate(p, SamplingParams(temperature=0, max_tokens=3, seed=c.seed))[0]
        for p, c in zip(prompts, completions)
    ]


def test_a_bad_prompt_raises_and_leaves_nothing_behind(tiny):
    llm, _ = tiny
    with pytest.raises(RequestError, match="not below"):
        llm.generate([[5], [10**6]], SamplingParams(max_tokens=400))
    with pytest.raises(RequestError) as caught:
        llm.generate([[5] * 600])
    assert caught.value.code == "context_length_exceeded"
    assert llm.generate([5], SamplingParams(max_tokens=1))[0].finish_reason == "length"
    assert llm.engine.stats()["waiting"] == 0


def test_generate_returns_what_the_tokens_say(llm):
    [completion] = llm.generate(PROMPT, GREEDY)
    assert completion.prompt_token_ids == llm.tokenize(PROMPT)
    assert completion.text == llm.detokenize(completion.token_ids, skip_special=True)
    assert completion.logprobs is None and completion.prompt_logprobs is None
    assert llm.generate([llm.tokenize(PROMPT), PROMPT], GREEDY)[1].text == completion.text


def test_stream_is_generate_in_pieces(llm):
    pieces = list(llm.stream(PROMPT, GREEDY))
    [whole] = llm.generate(PROMPT, GREEDY)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [p.token_id for p in pieces if p.token_id is not None] == whole.token_ids
    assert [p.finish_reason for p in pieces if p.finish_reason] == [whole.finish_reason]


def test_closing_a_stream_cancels_it(llm):
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=900, ignore_eos=True))
    next(stream)
    stream.close()
    # The next request is queued behind the cancellation, so it is over by now.
    llm.generate(PROMPT, SamplingParams(max_tokens=1))
    assert llm.engine.stats()["running"] == 0


def test_stop_strings_end_the_text(llm):
    [free] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    stop = free.text[10:14]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,))
    [stopped] = llm.generate(PROMPT, params)
    assert stopped.finish_reason == "stop" and stopped.text == free.text[: free.text.index(stop)]
    count = len(stopped.token_ids)
    assert stopped.token_ids == free.token_ids[:count] and count < len(free.token_ids)
    assert stop in llm.detokenize(stopped.token_ids, skip_special=True)
    assert "".join(piece.text for piece in llm.stream(PROMPT, params)) == stopped.text


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels want tensors on the GPU")
def test_greedy_answers_are_the_same_with_triton_kernels(llm):
    """The demo model through every Triton kernel, interpreted, against the torch references."""
    ids, params = llm.tokenize(PROMPT), SamplingParams(temperature=0, max_tokens=3, logprobs=0)
    [expected] = llm.generate([ids], params)
    call = Call("cpu", torch.float32)
    in_triton = [
        op
        for op in registered_ops()
        if any(kernel.backend.startswith("triton") for kernel, _ in candidates(op, call))
    ]
    with use_kernels(",".join(f"{op}=triton" for op in in_triton)):
        [found] = llm.generate([ids], params)
    assert found.token_ids == expected.token_ids
    for one, other in zip(found.logprobs, expected.logprobs):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one != other, "the kernels did not change"


def test_32_streams_get_equal_shares(llm):
    """Streams side by side: at the end of the first, each has nearly as much as it."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [llm.tokenize(f"def function_{index}(") for index in range(32)]
    counts, outbox = {}, Outbox()
    with LLM.from_config(replace(llm.config, max_batch_size=32)) as wide:
        for ids in prompts:
            request = GenerationRequest(prompt_token_ids=tuple(ids), params=params)
            counts[wide.engine.submit(request, outbox)] = 0
        while True:
            handle, event = outbox.get(timeout_s=120)
            counts[handle] += isinstance(event, TokenEvent)
            if isinstance(event, FinishEvent):
                break
    assert max(counts.values()) / min(counts.values()) < 1.5


def test_n_completions_can_be_had_one_by_one(llm):
    params = SamplingParams(max_tokens=8, n=3, seed=11, logprobs=0)
    completions = llm.generate([PROMPT, "import "], params)
    assert len(completions) == 6 and completions[0].seed == 11
    assert len({completion.seed for completion in completions}) == 3
    assert len({tuple(completion.token_ids) for completion in completions[:3]}) == 3
    for completion in completions:
        again = SamplingParams(max_tokens=8, seed=completion.seed, logprobs=0)
        [alone] = llm.generate(completion.prompt_token_ids, again)
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


def test_a_seed_is_chosen_and_reported(llm):
    first, second = (llm.generate(PROMPT, SamplingParams(max_tokens=8))[0] for _ in range(2))
    assert first.seed != second.seed
    again = SamplingParams(max_tokens=8, seed=second.seed)
    assert llm.generate(PROMPT, again)[0].token_ids == second.token_ids


def test_logprobs_on_request(llm):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    [completion] = llm.generate(PROMPT, params)
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert all(len(entry.top) == 2 and entry.rank == 1 for entry in completion.logprobs)
    assert completion.prompt_logprobs[0] is None
    scores = [entry.logprob for entry in completion.prompt_logprobs[1:]]
    assert scores == llm.score(PROMPT).logprobs[1:]


def test_chat_is_generate_on_the_rendered_template(llm):
    expected = llm.generate(llm.chat_ids(QUESTION), GREEDY)[0].text
    assert llm.chat(QUESTION, GREEDY).text == expected
    assert [c.text for c in llm.chat([QUESTION, QUESTION], GREEDY)] == [expected] * 2
    assert len(llm.chat(QUESTION, SamplingParams(max_tokens=2, n=2))) == 2
    with pytest.raises(RequestError):
        llm.chat([{"content": {"no": "text"}}, 3], GREEDY)


def test_tokenize_and_back(llm):
    text = "try:\n    café = '☃'\n"
    assert llm.detokenize(llm.tokenize(text)) == text


def test_what_is_not_built_says_so(llm):
    with pytest.raises(UnsupportedError, match="pooling 'sum'"):
        llm.embed("a", pooling="sum")
    with pytest.raises(RequestError, match="one completion"):
        llm.stream("a", SamplingParams(n=2))


def test_many_threads_may_share_one(llm):
    texts = {}

    def ask(index):
        texts[index] = llm.generate(PROMPT * (index + 1), GREEDY)[0].text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: llm.generate(PROMPT * (i + 1), GREEDY)[0].text for i in range(4)}


def test_after_close_nothing_is_served(tmp_path):
    write_tiny("llama", tmp_path / "tiny.gguf")
    llm = LLM(tmp_path / "tiny.gguf", device="cpu")
    assert llm.name == "tiny-llama" and "llama on cpu" in llm.describe()
    llm.generate([5], SamplingParams(max_tokens=1, constraint=Constraint("regex", "b+")))
    llm.close()
    llm.close()
    assert not llm.engine.alive
    constraint = Constraint("regex", "a+")
    for params in (None, SamplingParams(constraint=constraint)):  # whose compiler is closed too
        with pytest.raises(EngineError):
            llm.generate([5], params)


def test_fingerprints_tell_models_and_numerics_apart(tmp_path):
    write_tiny("llama", tmp_path / "a.gguf", seed=1)
    write_tiny("llama", tmp_path / "b.gguf", seed=2)

    def fingerprint(name, **options):
        with LLM(tmp_path / name, device="cpu", **options) as llm:
            return llm.fingerprint

    first = fingerprint("a.gguf")
    assert first == fingerprint("a.gguf", max_batch_size=2) and first.startswith("fp_")
    assert len({first, fingerprint("b.gguf"), fingerprint("a.gguf", numerics="fast")}) == 3


def test_bad_files_and_options_are_named(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match="bad.gguf"):
        LLM(tmp_path / "bad.gguf")
    with pytest.raises(GGUFError, match="missing.gguf"):
        LLM(tmp_path / "missing.gguf")
    with pytest.raises(UnsupportedError, match="numerics 'exact'"):
        LLM(numerics="exact")
    with pytest.raises(TypeError):
        LLM(speed="high")


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, oxillama_torch; assert 'torch' not in sys.modules;"
        "oxillama_torch.SamplingParams; assert 'torch' not in sys.modules;"
        "assert {'LLM', 'Completion', 'read_gguf'} <= set(dir(oxillama_torch))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import oxillama_torch

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        oxillama_torch.nothing  # noqa: B018


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_chat_with_tools(llm):
    params = SamplingParams(max_tokens=60, temperature=1.2, seed=3, n=2)
    done = llm.chat(QUESTION, params, tools=[WEATHER], tool_choice="required")
    for completion in done:
        assert completion.text == ""
        assert completion.tool_calls
        for call in completion.tool_calls:
            assert call.name == "get_weather"
            assert json.loads(call.arguments)["city"] in ("Oslo", "Paris")
    history = [*QUESTION, {"role": "tool", "tool_call_id": "c", "content": "Snow."}]
    assert llm.chat(history, GREEDY, tools=[WEATHER], tool_choice="none").tool_calls == ()


def test_chat_in_a_format(llm):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    schema["additionalProperties"] = False
    done = llm.chat(QUESTION, SamplingParams(max_tokens=20, seed=1), response_format=wanted)
    assert json.loads(done.text)["a"] in (True, False)
