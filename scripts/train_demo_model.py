#!/usr/bin/env python3
"""Train the demo model that ships with the package, from scratch, on the standard library of the
Python that runs this.

    python scripts/train_demo_model.py --minutes 60 --work /tmp/demo --out demo.gguf
    python scripts/train_demo_model.py --work /tmp/demo --resume         # after an interruption
    python scripts/train_demo_model.py --work /tmp/demo --export-only    # the last checkpoint

The learning rate follows the share of the budget that is used up (``--minutes`` of computing time,
or ``--steps``): a short warm-up, constant almost to the middle, then linearly down to zero.
Stopping early therefore gives a poorer model than a smaller budget does; ``--resume`` wants the
same budget again. Matrices are trained with Muon, embeddings and norms with AdamW, in bfloat16
autocast.

Needs the packages torch, transformers, tokenizers and gguf, and 1.5 GB of memory per process. A C++
compiler makes it a third faster (torch.compile); ``--no-compile`` does without.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import random
from pathlib import Path

import torch
import torch.distributed as dist
from demo_batches import BatchSource, encode_documents
from demo_chat import render
from demo_corpus import facts, held_out_text, sources
from demo_export import train_tokenizer, verify_gguf, write_gguf
from demo_measure import HELD_OUT_FILE, evaluate
from demo_tools import tool_conversation
from demo_training import Budget, Trainer, hidden_states, make_model
from tokenizers import Tokenizer


def make_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer, or train it on the sources, the answers (five times over) and tool
    calls."""
    if not path.exists():
        rng = random.Random(0)
        answers = [
            f"What is `{fact.name}`?\n{fact.summary}\n`{fact.signature}`" for fact in facts()
        ]
        tools = [render(*tool_conversation(rng)) for _ in range(300)]
        documents = [text for _, text in sources()]
        train_tokenizer(documents + answers * 5 + tools).save(str(path))
    return Tokenizer.from_file(str(path))


def train(rank: int, args: argparse.Namespace) -> None:
    """Run one process's part of the training."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.processes > 1:
        meeting_point = f"file://{args.work.resolve()}/processes"
        dist.init_process_group(
            "gloo", init_method=meeting_point, rank=rank, world_size=args.processes
        )
    tokenizer = make_tokenizer(args.work / "tokenizer.json")
    code = encode_documents(tokenizer, [text for _, text in sources()])
    checkpoint = args.work / "checkpoint.pt"
    stored_step = torch.load(checkpoint)["progress"]["step"] if args.resume else 0
    batches = BatchSource(tokenizer, facts(), code, args.seed + stored_step)
    trainer = Trainer(batches, Budget(args.minutes, args.steps), rank, args.processes)
    if args.resume:
        trainer.load(checkpoint)
    if not args.no_compile:
        trainer.run_layers = torch.compile(hidden_states, dynamic=False)
    if rank == 0:
        print(
            f"{len(batches.turns.facts)} facts, {len(code) / 1e6:.2f} M tokens of code", flush=True
        )
    trainer.train(checkpoint)
    if args.processes > 1:
        dist.destroy_process_group()


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint as a GGUF file, verify the file against it and measure the file."""
    model, tokenizer = make_model(), make_tokenizer(args.work / "tokenizer.json")
    model.load_state_dict(torch.load(args.work / "checkpoint.pt")["model"])
    out = args.out or args.work / "demo.gguf"
    write_gguf(out, model, tokenizer)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    print(f"largest weight error {verify_gguf(out, model):.4f} of its block's largest weight")
    evaluate(out, tokenizer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="computing time to spend (default 60)")
    add("--steps", type=int, help="steps of about 4096 tokens to take, instead of --minutes")
    add("--processes", type=int, default=2, help="processes that share each batch (default 2)")
    add("--threads", type=int, default=1, help="CPU threads of each process (default 1)")
    add("--seed", type=int, default=1, help="seed of the weights and of the order of the text")
    add("--work", type=Path, default=Path("demo-training"), help="folder of tokenizer, checkpoint")
    add("--out", type=Path, help="the GGUF file to write (default: demo.gguf in --work)")
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--export-only", action="store_true", help="write and measure the checkpoint, no training")
    add("--no-compile", action="store_true", help="run without torch.compile")
    add("--write-held-out", action="store_true", help="only write demo_heldout.txt anew")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.write_held_out:
        HELD_OUT_FILE.write_text(held_out_text())
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.export_only:
        make_tokenizer(args.work / "tokenizer.json")
        (args.work / "processes").unlink(missing_ok=True)
        if args.processes > 1:
            torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)
        else:
            train(0, args)
    export(args)


if __name__ == "__main__":
    main()
