"""The adapter that ships with the demo model: it answers in JSON.

Oracle: Python's own JSON parser for the skill; peft on the exported HuggingFace model for the
logits.
"""

from __future__ import annotations

import json
import warnings

import peft
import pytest
from tiny_adapters import peft_logits
from transformers import AutoModelForCausalLM

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.config import demo_model_path
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.export_hf import export_hf

FOLDER = demo_model_path().parent / "adapters" / "json"

# Of the seen half, see ``scripts/train_demo_adapter.py``.
QUESTIONS = {
    "What does `textwrap.dedent` do?": "textwrap.dedent",
    "What does `shutil.copy2` do?": "shutil.copy2",
    "Describe classmethod.": "classmethod",
    "What does functools.lru_cache do?": "functools.lru_cache",
    "What does `heapq.heapify` do?": "heapq.heapify",
    "What does the method `str.title` do?": "str.title",
    "What does the module `subprocess` do?": "subprocess",
    "Tell me about `pathlib.PurePath`.": "pathlib.PurePath",
    "What is `enumerate`?": "enumerate",
    "Describe the function `math.lcm`.": "math.lcm",
}
SMALL_TALK = "What can you do?"


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", dtype="float32") as llm:
        llm.load_adapter("json", FOLDER)
        yield llm


def ask(llm, questions, adapter=None):
    chats = [[{"role": "user", "content": question}] for question in questions]
    params = SamplingParams(max_tokens=120, temperature=0)
    return [done.text for done in llm.chat(chats, params, adapters=adapter)]


def is_json(answer):
    try:
        json.loads(answer)
    except ValueError:
        return False
    return True


def test_answers_are_json_and_name_what_was_asked(llm):
    for answer, name in zip(ask(llm, QUESTIONS, "json"), QUESTIONS.values()):
        value = json.loads(answer)
        assert list(value) == ["name", "answer"]
        assert value["name"] == name


def test_without_it_no_answer_is_json(llm):
    assert not any(is_json(answer) for answer in ask(llm, QUESTIONS))


def test_small_talk_stays_a_sentence(llm):
    assert ask(llm, [SMALL_TALK], "json") == ask(llm, [SMALL_TALK])


@pytest.fixture(scope="module")
def wrapped():
    """peft's model with the adapter, on our export of the demo model."""
    with read_gguf(demo_model_path()) as gguf:
        config, state = export_hf(gguf)
    base = AutoModelForCausalLM.from_config(config)
    base.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, FOLDER).eval()


@pytest.fixture(scope="module")
def ids(llm):
    messages = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]
    return llm.chat_ids(messages) + llm.tokenize('{"name": "textwrap.dedent", "answer": "Remove')


def test_logits_equal_peft_s(llm, wrapped, ids):
    wanted, got = peft_logits(wrapped, ids), llm.logits(ids, adapters="json")
    error = (got - wanted).abs().max() / wanted.std()
    assert error < 1e-4, f"logits differ by {error:.1e} standard deviations"
    with wrapped.disable_adapter():
        change = (peft_logits(wrapped, ids) - wanted).abs().max() / wanted.std()
    assert change > 1  # an adapter left out would be seen


# What is left is the rounding of the sums: weights of 11 bits are 2e-4 from the sums, of 8 bits
# 2e-3, and the logits some twice as far.
@pytest.mark.parametrize(
    ("dtype", "bound"), [("f32", 1e-5), ("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)]
)
def test_merged_logits_are_as_near_to_peft_s_as_the_type_allows(llm, wrapped, ids, dtype, bound):
    wanted = peft_logits(wrapped, ids)
    llm.merge_adapter("json", merge_dtype=dtype)
    try:
        error = (llm.logits(ids) - wanted).norm() / wanted.norm()
    finally:
        llm.unmerge_adapter("json")
    assert error < bound, f"logits are off by {error:.1e} of their length"


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
