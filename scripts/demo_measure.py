"""What the demo model is judged by: trained questions answered verbatim, and the loss on unseen
source code.

Runs on Hugging Face's implementation, so that a training run can be judged without the package;
``eval_demo.py`` measures the same two figures with the package itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_chat import render
from demo_export import IM_END, read_gguf
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
HELD_OUT_FILE, QUESTIONS_FILE = HERE / "demo_heldout.txt", HERE / "demo_questions.jsonl"


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer) -> float:
    """Nats per token on ``demo_heldout.txt``, in windows of 512 tokens."""
    ids = torch.tensor(tokenizer.encode(HELD_OUT_FILE.read_text()).ids)
    count = (len(ids) - 1) // 512 * 512
    inputs, labels = ids[:count].view(-1, 512), ids[1 : count + 1].view(-1, 512)
    total = 0.0
    for row, label in zip(inputs.split(8), labels.split(8), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=row, use_cache=False).logits
        total += float(
            F.cross_entropy(logits.float().flatten(0, 1), label.flatten(), reduction="sum")
        )
    return total / count


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers in float32; prompts of one length are run together, so that nothing needs
    padding."""
    end = tokenizer.token_to_id(IM_END)
    prompts = [render([{"role": "user", "content": text}], prompt_only=True) for text in questions]
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    answers = [""] * len(questions)
    for length in sorted({len(ids) for ids in encoded}):
        members = [i for i, ids in enumerate(encoded) if len(ids) == length]
        batch = torch.tensor([encoded[i] for i in members])
        mask = torch.ones_like(batch)
        output = model.generate(
            batch, attention_mask=mask, max_new_tokens=120, do_sample=False, eos_token_id=end
        )
        for i, ids in zip(members, output[:, length:].tolist(), strict=True):
            answers[i] = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    return answers


def evaluate(path: Path, tokenizer: Tokenizer) -> None:
    """Print the share of ``demo_questions.jsonl`` answered verbatim and the held-out loss of an
    exported file."""
    model = read_gguf(path)
    lines = [json.loads(line) for line in QUESTIONS_FILE.read_text().splitlines()]
    answers = answer(model, tokenizer, [line["question"] for line in lines])
    pairs = list(zip(lines, answers, strict=True))
    wrong = [(line, got) for line, got in pairs if got.strip() != line["answer"].strip()]
    for line, got in wrong[:10]:
        print(f"  {line['question']}\n    wanted {line['answer']}\n    got    {got[:200].strip()}")
    print(f"verbatim {1 - len(wrong) / len(lines):.1%} of {len(lines)}")
    print(f"held-out loss {held_out_loss(model, tokenizer):.3f} nats per token")
