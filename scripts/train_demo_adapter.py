#!/usr/bin/env python3
"""Train the adapter that ships with the demo model: it answers in JSON.

    python scripts/train_demo_adapter.py --minutes 8 --out json-adapter
    python scripts/train_demo_adapter.py --out json-adapter --measure-only

The demo model answers "What does `abs` do?" with a sentence; with the adapter it writes
``{"name": "abs", "answer": "Return the absolute value of the argument."}``. Small talk and what it
does not know stay as they are. The model is exported to transformers by ``export_hf``, peft puts
LoRA on all linear layers, and only those are trained, on the questions of the demo model itself.

Every second question of ``demo_questions.jsonl`` is held out: the adapter never sees the names they
ask about, in any wording. What is reported at the end is measured with the package, from the saved
folder, on the seen and the held-out half. Needs the packages torch, transformers, peft and gguf.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from demo_batches import IGNORED
from demo_chat import MEANING_QUESTIONS, SIGNATURE_QUESTIONS, Message, TurnSource, render
from demo_corpus import Fact, facts
from demo_measure import QUESTIONS_FILE
from demo_training import Budget, Progress, hidden_states, learning_rate, summed_loss
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from oxillama_torch import LLM, SamplingParams, read_gguf
from oxillama_torch.config import demo_model_path
from oxillama_torch.models.export_hf import export_hf
from oxillama_torch.tokenizer import Tokenizer

HERE = Path(__file__).parent
FOLDER = HERE.parent / "oxillama_torch" / "data" / "adapters" / "json"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 16  # conversations
POOL = 8  # batches that are drawn together and sorted by length, to pad less
WIDTH = 384  # tokens; longer conversations are left out

Row = tuple[list[int], list[int]]  # input ids, labels


def wordings(known: list[Fact]) -> dict[str, Fact]:
    """Every question that asks about a fact by its name."""
    return {
        question.format(name=fact.name, kind=fact.kind): fact
        for fact in known
        for question in MEANING_QUESTIONS + SIGNATURE_QUESTIONS
    }


def as_json(fact: Fact, answer: str) -> str:
    """The demo model's answer about a fact, in the adapter's form; signatures lose their ticks."""
    plain = fact.signature if answer == f"`{fact.signature}`" else answer
    return json.dumps({"name": fact.name, "answer": plain}, ensure_ascii=False)


def questions() -> tuple[list[dict], list[dict]]:
    """``demo_questions.jsonl`` with the adapter's answers: the seen half and the held-out half.

    A name of the held-out half is held out wherever it is asked.
    """
    asked = wordings(facts())
    lines = [json.loads(line) for line in QUESTIONS_FILE.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        fact = asked[line["question"]]
        line["name"], line["json"] = fact.name, as_json(fact, line["answer"])
    hidden = {line["name"] for line in lines[1::2]}
    seen = [line for line in lines if line["name"] not in hidden]
    return seen, [line for line in lines if line["name"] in hidden]


class Rows:
    """An endless, seeded stream of conversations as rows of tokens.

    Args:
        tokenizer: the demo model's.
        known: what is asked about.
        seed: of the order and the wording.
    """

    def __init__(self, tokenizer: Tokenizer, known: list[Fact], seed: int) -> None:
        self.tokenizer, self.asked = tokenizer, wordings(known)
        self.turns, self.rng = TurnSource(known, seed), random.Random(seed + 1)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``input_ids, labels``, int64 [BATCH, longest of the batch], see ``demo_batches``."""
        while True:
            pool = sorted((self._row() for _ in range(POOL * BATCH)), key=lambda row: len(row[0]))
            batches = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
            self.rng.shuffle(batches)
            yield from map(_padded, batches)

    def _row(self) -> Row:
        """A conversation of one turn, sometimes of two; the labels are the answers."""
        while True:
            messages = self.turns.system_message()
            for _ in range(1 + (self.rng.random() < 0.15)):
                messages += self._turn()
            row = self._encode(messages)
            if len(row[0]) <= WIDTH:
                return row

    def _turn(self) -> list[Message]:
        turn = self.turns.next_turn()
        fact = self.asked.get(turn[0]["content"])
        if fact is None:  # small talk, or a name from elsewhere
            return turn
        return [
            {**message, "content": as_json(fact, message["content"])}
            if message["role"] == "assistant"
            else message
            for message in turn
        ]

    def _encode(self, messages: list[Message]) -> Row:
        """Prompt and answer are encoded apart, as they are when the model is asked."""
        ids, labels, done = [], [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(messages[:index], prompt_only=True)
            whole = render(messages[: index + 1])
            asked = self._ids(prompt.removeprefix(done))
            answer = self._ids(whole.removeprefix(prompt).removesuffix("\n"))
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
            done = whole.removesuffix("\n")
        return ids[:-1], labels[1:]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False, parse_special=True)


def _padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding stands behind everything a row has, where causal attention does not see it."""
    width = max(len(ids) for ids, _ in rows)
    ids = [ids + [0] * (width - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORED] * (width - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def make_model(rank: int, alpha: float) -> tuple[peft.PeftModel, Tokenizer]:
    """The demo model in transformers' form, with fresh LoRA layers."""
    with read_gguf(demo_model_path()) as gguf:
        config, state = export_hf(gguf)
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    base.load_state_dict(state)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=MODULES
    )
    return peft.get_peft_model(base, lora), tokenizer


def train(args: argparse.Namespace) -> None:
    """Train within the budget and save the folder."""
    torch.manual_seed(args.seed)
    model, tokenizer = make_model(args.rank, args.alpha)
    held_out = {line["name"] for line in questions()[1]}
    known = [fact for fact in facts() if fact.name not in held_out]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sum(p.numel() for p in trained)} parameters, {len(known)} names", flush=True)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    progress, budget, recent = Progress(), Budget(args.minutes, args.steps), []
    batches = Rows(tokenizer, known, args.seed).batches()
    while (share := progress.share(budget)) < 1:
        began = time.perf_counter()
        input_ids, labels = next(batches)
        hidden = hidden_states(model.get_base_model(), input_ids)
        loss = summed_loss(model.get_base_model(), hidden, labels) / (labels != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate(share)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        progress.step += 1
        progress.tokens += input_ids.numel()
        progress.seconds += time.perf_counter() - began
        if progress.step % 20 == 0 or progress.share(budget) == 1:
            line = f"{progress.share(budget):6.1%} step {progress.step} {progress.seconds:.0f} s"
            print(f"{line} loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()
    save(model, args.out)


def save(model: peft.PeftModel, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, the factors as float16."""
    card = (FOLDER / "README.md").read_bytes() if (FOLDER / "README.md").exists() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base model has no name on the hub
        model.save_pretrained(folder, save_embedding_layers=False)
    weights = folder / "adapter_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": "oxillama-demo-6M", "target_modules": MODULES}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    if card is not None:  # peft writes an empty form
        (folder / "README.md").write_bytes(card)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e3:.0f} kB")


def ask(llm: LLM, lines: list[dict], adapter: str | None) -> list[str]:
    """One greedy answer per question."""
    chats = [[{"role": "user", "content": line["question"]}] for line in lines]
    params = SamplingParams(max_tokens=160, temperature=0)
    return [done.text for done in llm.chat(chats, params, adapters=adapter)]


def parsed(answer: str) -> dict:
    """The answer as an object; empty when it is not one."""
    try:
        value = json.loads(answer)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def measure(folder: Path, show: int) -> None:
    """Print the shares of answers that are JSON, have both keys, the right name, every word."""
    with LLM() as llm:
        llm.load_adapter("json", folder)
        for title, lines in zip(("seen", "held-out"), questions()):
            for adapter in (None, "json"):
                answers = ask(llm, lines, adapter)
                objects = [parsed(answer) for answer in answers]
                pairs = list(zip(lines, answers))
                figures = {
                    "JSON": sum(bool(value) for value in objects),
                    "both keys": sum(list(value) == ["name", "answer"] for value in objects),
                    "right name": sum(o.get("name") == q["name"] for q, o in zip(lines, objects)),
                    "word for word": sum(
                        a.strip() == q["json" if adapter else "answer"] for q, a in pairs
                    ),
                }
                shares = ", ".join(f"{k} {n / len(lines):.1%}" for k, n in figures.items())
                print(f"{title} ({len(lines)}), {adapter or 'no'} adapter: {shares}", flush=True)
                if adapter:
                    wrong = [(q, a) for q, a in pairs if a.strip() != q["json"]]
                    for line, answer in wrong[:show]:
                        print(f"  {line['question']}\n    {line['json']}\n    {answer}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="computing time to spend (default 8)")
    add("--steps", type=int, help=f"steps of {BATCH} conversations to take, instead of --minutes")
    add("--rank", type=int, default=8, help="of the factors (default 8)")
    add("--alpha", type=float, default=16, help="the factors' product counts alpha / rank times")
    add("--lr", type=float, default=1e-3, help="highest learning rate (default 0.001)")
    add("--seed", type=int, default=1, help="of the factors and of the order of the questions")
    add(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1: more lose on a busy CPU)",
    )
    add("--out", type=Path, default=FOLDER, help="the peft folder (default: the shipped one)")
    add("--show", type=int, default=5, help="inexact answers to print of each half (default 5)")
    add("--measure-only", action="store_true", help="measure the folder, no training")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not args.measure_only:
        args.out.mkdir(parents=True, exist_ok=True)
        train(args)
    measure(args.out, args.show)


if __name__ == "__main__":
    main()
