#!/usr/bin/env python3
"""Measure the demo model with the package itself: answers known by heart, and loss on unseen code.

    python scripts/eval_demo.py [--model oxillama_torch/data/demo.gguf] [--show 5]
Two figures are printed: the share of the questions in ``demo_questions.jsonl`` (all asked in
training) that are answered word for word, greedily; and the mean loss on ``demo_heldout.txt``,
source code that was never trained on, in nats per token and bits per byte.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import json
import math
from pathlib import Path

from oxillama_torch import LLM, SamplingParams

HERE = Path(__file__).parent
WINDOW = 512  # tokens that are scored together


def ask(llm: LLM, questions: list[str]) -> list[str]:
    """One greedy answer per question, all asked at once."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    params = SamplingParams(max_tokens=120, temperature=0)
    return [completion.text for completion in llm.chat(conversations, params)]


def held_out_loss(llm: LLM, text: str) -> tuple[float, float]:
    """The text's loss in windows of ``WINDOW`` tokens: (nats per token, bits per byte)."""
    ids = llm.tokenize(text)
    count = (len(ids) - 1) // WINDOW * WINDOW
    nats = 0.0
    for start in range(0, count, WINDOW):
        logprobs = llm.score(ids[start : start + WINDOW + 1]).logprobs
        nats -= sum(logprob for logprob in logprobs if logprob is not None)
    scored_bytes = len(llm.detokenize(ids[1 : count + 1]).encode())
    return nats / count, nats / math.log(2) / scored_bytes


def report_answers(llm: LLM, show: int) -> None:
    """Print the share of questions answered verbatim, and up to ``show`` of the others."""
    lines = (HERE / "demo_questions.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    answers = ask(llm, [pair["question"] for pair in pairs])
    wrong = [
        (pair, answer)
        for pair, answer in zip(pairs, answers)
        if answer.strip() != pair["answer"].strip()
    ]
    for pair, answer in wrong[:show]:
        print(f"{pair['question']}\n  wanted {pair['answer']}\n  got    {answer.strip()[:300]}")
    print(f"verbatim answers  {1 - len(wrong) / len(pairs):.1%} of {len(pairs)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="GGUF file (default: the shipped demo model)")
    parser.add_argument("--show", type=int, default=5, help="wrong answers to print (default 5)")
    args = parser.parse_args()
    with LLM(args.model) as llm:
        report_answers(llm, args.show)
        text = (HERE / "demo_heldout.txt").read_text(encoding="utf-8")
        nats, bits = held_out_loss(llm, text)
    print(f"held-out loss     {nats:.3f} nats per token, {bits:.3f} bits per byte")


if __name__ == "__main__":
    main()
