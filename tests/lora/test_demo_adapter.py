"""The adapter that ships with the demo model: it answers in JSON.

Oracle: Python's own JSON parser for the skill; peft on the exported HuggingFace model for the
logits.
"""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
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


def test_logits_equal_peft_s(llm):
    messages = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]
    ids = llm.chat_ids(messages) + llm.tokenize('{"name": "textwrap.dedent", "answer": "Remove')
    with read_gguf(demo_model_path()) as gguf:
        config, state = export_hf(gguf)
    base = AutoModelForCausalLM.from_config(config)
    base.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(base, FOLDER).eval()
    wanted, got = peft_logits(wrapped, ids), torch.as_tensor(llm.logits(ids, adapters="json"))
    error = (got - wanted).abs().max() / wanted.std()
    assert error < 1e-4, f"logits differ by {error:.1e} standard deviations"
    with wrapped.disable_adapter():
        change = (peft_logits(wrapped, ids) - wanted).abs().max() / wanted.std()
    assert change > 1  # an adapter left out would be seen


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
