"""The draft that ships with the demo model: it fits, it helps, and it changes nothing.

Oracle: the demo model without it.
"""

from __future__ import annotations

from oxillama_torch import LLM, SamplingParams

PROMPTS = ["import os\nimport sys\n\n\ndef main():\n", "What does `abs` do?"]


def test_the_shipped_draft_guesses_for_the_demo_model():
    for_both = {"max_context": 256, "max_batch_size": 4, "numerics": "invariant"}
    wanted = [
        SamplingParams(temperature=0, max_tokens=32, logprobs=1),
        SamplingParams(temperature=0.7, seed=5, max_tokens=32),
    ]
    answers, stats = [], {}
    for speculation in ("none", "lookup", "draft"):
        with LLM(speculation=speculation, **for_both) as llm:
            found = [c for params in wanted for c in llm.generate(PROMPTS, params)]
            answers.append([(c.text, c.token_ids, c.logprobs) for c in found])
            stats[speculation] = llm.engine.stats()
    assert answers[0] == answers[1] == answers[2]
    assert stats["none"]["proposed_tokens"] == 0
    assert stats["draft"]["accepted_tokens"] > 0 == stats["draft"]["proposer_failures"]
    assert stats["draft"]["steps"] < stats["none"]["steps"]
