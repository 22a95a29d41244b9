"""A budget of reasoning, in the engine. The demo model does not reason: another pair of its marker
tokens stands for the reasoning's. Oracle: counting.
"""

import pytest

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.chat.families.hermes import Hermes
from oxillama_torch.chat.grammar import Thinking, Wish
from oxillama_torch.chat.reply import ReplyFormat
from oxillama_torch.sampling.constraint import Constraint


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu") as llm:
        yield llm


@pytest.mark.parametrize("budget", [0, 1, 9])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_end_marker_comes_after_so_many_tokens(llm, budget, temperature):
    family = Hermes("", llm.tokenizer.special_id)
    begin, end = family.marker("<tool_call>"), family.marker("</tool_call>")
    thinking = Thinking(begin, end, True, budget)
    constraint = Constraint("lark", family.grammar(Wish(thinking=thinking)))
    params = SamplingParams(
        max_tokens=20, temperature=temperature, seed=1, constraint=constraint, ignore_eos=True
    )
    prompt = llm.chat_ids([{"role": "user", "content": "Who are you?"}])
    [done] = llm.generate([prompt], params)
    assert done.token_ids.index(end.token_id) == budget
    assert len(done.token_ids) == 20
    reply = ReplyFormat(family, thinking).reply(llm.tokenizer, ())
    for token_id in done.token_ids:
        reply.push(token_id)
    assert reply.reasoning_tokens == budget + 1  # the marker is one of them
