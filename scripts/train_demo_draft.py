#!/usr/bin/env python
"""Train the draft of the demo model that ships with the package: a model of a million parameters
with the same vocabulary, whose guesses the demo model checks (``--speculation draft``).

    python scripts/train_demo_draft.py --work /tmp/draft --out demo_draft.gguf
    python scripts/train_demo_draft.py --work /tmp/draft --resume

It reads what the demo model was trained on, in batches of a quarter of the size, and starts from
the principal components of the demo model's embedding. With ``--distil`` it learns the demo model's
own distribution, KL(demo || draft), instead of the text: three times the work per token. At the
end, the share of tokens is printed at which both find the same one likeliest: what greedy decoding
would accept.

The run depends on the seed and the number of steps alone, as far as sums on one CPU do. Needs the
packages torch, transformers, tokenizers and gguf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_batches import IGNORED, BatchSource, encode_documents
from demo_corpus import facts, sources
from demo_export import model_config, read_gguf, read_tokenizer, verify_gguf, write_gguf
from demo_training import Budget, Trainer, hidden_states, lower_precision, make_model
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).parent.parent / "oxillama_torch" / "data" / "demo.gguf"
MEASURED_BATCHES = 8
PEAK_LR, EMBEDDING_STD = 3e-3, 0.05


def draft_config() -> LlamaConfig:
    """1.0 million parameters. Two layers, because each costs a step's overhead whatever its
    width."""
    config = model_config()
    config.hidden_size, config.intermediate_size = 128, 512
    config.num_hidden_layers = 2
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    return config


def make_draft(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """A fresh draft whose embedding begins as the principal components of the demo model's."""
    draft = make_model(draft_config())
    weight = draft.model.embed_tokens.weight
    u, s, _ = torch.linalg.svd(teacher.model.embed_tokens.weight.detach(), full_matrices=False)
    components = (u * s)[:, : weight.shape[1]]
    with torch.no_grad():
        weight.copy_(components * (EMBEDDING_STD / components.std()))
    return draft


class SmallBatches(BatchSource):
    """A thousand tokens per step: so small a model learns more from more steps."""

    def batch(self, step: int, chat_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        if step % 16 == 15:
            rows = [self._code_row(1024)]
        elif step % 8 == 3:
            rows = [self._tool_row(384), self._tool_row(384), self._code_row(384)]
        else:
            chats = round(4 * chat_share)
            rows = [self._chat_row(256) for _ in range(chats)]
            rows += [self._code_row(256) for _ in range(4 - chats)]
        input_ids, labels = zip(*rows, strict=True)
        return torch.tensor(input_ids), torch.tensor(labels)


class DraftTrainer(Trainer):
    """Trains the draft on the text. AdamW for all of it: for batches this small, Muon's work on
    each matrix would be most of a step."""

    def __init__(self, batches: BatchSource, budget: Budget, teacher: LlamaForCausalLM) -> None:
        super().__init__(batches, budget, 0, 1, make_draft(teacher))
        adam = torch.optim.AdamW(
            self.model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        adam.param_groups[0]["peak_lr"] = PEAK_LR
        self.optimizers = [adam]


class Distiller(DraftTrainer):
    """Trains the draft on what the demo model says about the same rows."""

    def __init__(self, batches: BatchSource, budget: Budget, teacher: LlamaForCausalLM) -> None:
        super().__init__(batches, budget, teacher)
        self.teacher = teacher

    def loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kept = labels != IGNORED
        with torch.no_grad():
            wanted = scores(self.teacher, hidden_states(self.teacher, input_ids)[kept])
        found = scores(self.model, self.run_layers(self.model, input_ids)[kept])
        return F.kl_div(found, wanted, reduction="sum", log_target=True)


def scores(model: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 [positions, vocabulary]."""
    with lower_precision():
        logits = model.lm_head(hidden)
    return logits.float().log_softmax(-1)


@torch.no_grad()
def agreement(
    draft: LlamaForCausalLM, teacher: LlamaForCausalLM, batches: BatchSource
) -> dict[str, float]:
    """Share of labels at which both models find the same token likeliest, by kind of row."""
    same, count = dict.fromkeys(("chat", "code"), 0), dict.fromkeys(("chat", "code"), 0)
    for _ in range(MEASURED_BATCHES):
        for kind, share in (("chat", 1.0), ("code", 0.0)):
            input_ids, labels = batches.batch(0, share)
            kept = labels != IGNORED
            first, second = (
                scores(model, hidden_states(model, input_ids)[kept]).argmax(-1)
                for model in (draft, teacher)
            )
            same[kind] += int((first == second).sum())
            count[kind] += int(kept.sum())
    return {kind: same[kind] / count[kind] for kind in same}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO, help="the demo model (default: the one that ships)")
    add("--steps", type=int, default=1400, help="steps of about 1024 tokens (default 1400)")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--seed", type=int, default=1, help="seed of the weights and of the order of the text")
    add("--work", type=Path, default=Path("draft-training"), help="folder of the checkpoint")
    add("--out", type=Path, help="the GGUF file to write (default: demo_draft.gguf in --work)")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--distil", action="store_true", help="learn the demo model's distribution of the text")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, teacher = read_tokenizer(args.model), read_gguf(args.model)
    code = encode_documents(tokenizer, [text for _, text in sources()])
    checkpoint = args.work / "checkpoint.pt"
    stored_step = torch.load(checkpoint)["progress"]["step"] if args.resume else 0
    batches = SmallBatches(tokenizer, facts(), code, args.seed + stored_step)
    budget = Budget(0.0, args.steps)
    trainer = (Distiller if args.distil else DraftTrainer)(batches, budget, teacher)
    if args.resume:
        trainer.load(checkpoint)
    trainer.train(checkpoint)
    out = args.out or args.work / "demo_draft.gguf"
    description = "Guesses what the demo model will say; trained on the same text"
    write_gguf(out, trainer.model, tokenizer, "oxillama demo draft 1M", description)
    error = verify_gguf(out, trainer.model)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, largest weight error {error:.4f}")
    stored = read_gguf(out, draft_config())
    shares = agreement(stored, teacher, BatchSource(tokenizer, facts(), code, args.seed + 10**6))
    print(", ".join(f"{kind} {share:.1%} of tokens agree" for kind, share in shares.items()))


if __name__ == "__main__":
    main()
