"""What constraints cost: masks of a large vocabulary, the first use of a schema, decoding with one.

    python scripts/bench_constraints.py VOCABULARY.gguf [--rounds 5] [--no-decode]

Masks are computed in one thread along documents that the schemas allow, tokenized as the model's
vocabulary has it; every position of every document counts, the first ones of a fresh grammar too.
What counts is that thread's processor time. The first use of a grammar is trying it out in the
worker process, which runs already, compiling it here, and the first mask: wall time, the best of
several rounds. Decoding: the demo model, batch 32, with the schema and without by turns.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import torch

from oxillama_torch import LLM, SamplingParams, read_gguf
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler, Matcher
from oxillama_torch.tokenizer.tokenizer import Tokenizer

ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "minLength": 1, "maxLength": 80},
        "zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"},
        "city": {"type": "string", "description": "Name of the town, in its own language."},
        "country": {"enum": ["DE", "FR", "IT", "JP", "GB", "US", "BR", "IN", "ZA", "AU"]},
    },
    "required": ["street", "zip", "city", "country"],
    "additionalProperties": False,
}
#: About 2 KB, with what tool definitions and answer formats usually have.
ORDER = {
    "type": "object",
    "description": "An order as the shop's system takes it in; sent by the customer's assistant.",
    "properties": {
        "id": {"type": "string", "format": "uuid", "description": "Identifies the order."},
        "placed": {"type": "string", "format": "date-time", "description": "When it was placed."},
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 120},
                "email": {"type": "string", "format": "email"},
                "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 150},
                "address": {"$ref": "#/$defs/address"},
            },
            "required": ["name", "email", "age", "address"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 50,
            "items": {
                "type": "object",
                "properties": {
                    "article": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,6}$"},
                    "amount": {"type": "integer", "minimum": 1, "maximum": 999},
                    "price": {"type": "number", "minimum": 0},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                },
                "required": ["article", "amount", "price", "note"],
                "additionalProperties": False,
            },
        },
        "paid": {"type": "boolean", "description": "Whether the money has arrived."},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 10},
    },
    "required": ["id", "placed", "customer", "lines", "paid", "tags"],
    "additionalProperties": False,
    "$defs": {"address": ADDRESS},
}
HOME = {"street": "Unter den Linden 7", "zip": "10117", "city": "Köln-Mülheim", "country": "DE"}
DOCUMENT = {
    "id": "0f8fad5b-d9cb-469f-a165-70867728950e",
    "placed": "2026-11-20T09:30:00Z",
    "customer": {"name": "Zoë O'Brien 李", "email": "zoe@example.org", "age": 41, "address": HOME},
    "lines": [
        {"article": f"AB-{1000 + i}", "amount": i + 1, "price": round(9.95 * i, 2), "note": note}
        for i, note in enumerate([None, "gift wrap, please", "the blue one", None])
    ],
    "paid": False,
    "tags": ["express", "new customer"],
}
GRAMMARS = Path(__file__).parent.parent / "tests" / "support" / "grammars"
CASES: dict[str, tuple[Constraint, str]] = {
    "schema of 2 KB": (Constraint.json_schema(ORDER), json.dumps(DOCUMENT, ensure_ascii=False)),
    "any JSON object": (Constraint("json_object"), json.dumps(DOCUMENT, ensure_ascii=False)),
    "GBNF, a list": (
        Constraint("gbnf", 'root ::= ("- " [^\\n]{1,80} "\\n")+'),
        "- the first of several lines\n- and, after it, a second: longer, with (marks)\n",
    ),
    "GBNF, recursive": (
        Constraint("gbnf", (GRAMMARS / "json.gbnf").read_text()),
        json.dumps(DOCUMENT, ensure_ascii=False),
    ),
    "GBNF, letter by letter": (
        Constraint("gbnf", (GRAMMARS / "c.gbnf").read_text()),
        "int main(int a, char b) {\n  return -a*(b+2);}\n",
    ),
    "regex": (
        Constraint("regex", "([A-Z][a-z]+ )+[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        "Meeting In The Large Hall On 2026-11-20",
    ),
}


def main() -> None:
    options = _options()
    print(
        f"{platform.processor() or platform.machine()}, {llguidance.__name__} "
        f"{llguidance.get_version().splitlines()[0]}\n"
    )
    with read_gguf(options.vocabulary) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    started = time.perf_counter()
    compiler = ConstraintCompiler(tokenizer)
    print(
        f"vocabulary of {tokenizer.vocab_size}: made ready once in "
        f"{1e3 * (time.perf_counter() - started):.0f} ms\n"
    )
    compiler.matcher(Constraint("regex", "a"))  # starts a worker process
    print("| grammar | masks | p50 µs | p99 µs | max µs | accept p50 µs | first use ms |")
    print("|---|---|---|---|---|---|---|")
    for name, (constraint, text) in CASES.items():
        ids = tokenizer.encode(text, add_special=False, at_start=False)
        _masks(name, compiler, constraint, ids, options)
    compiler.close()
    if not options.no_decode:
        _decode(options.rounds)


def _masks(
    name: str, compiler: ConstraintCompiler, constraint: Constraint, ids: list[int], options: Any
) -> None:
    """One line: times along a document, over several fresh matchers."""
    first, masks, accepts = [], [], []
    for number in range(options.rounds):
        # Another annotation or blank makes another constraint: nothing is found compiled.
        fresh = Constraint(constraint.kind, constraint.source + " " * number, "x")
        if constraint.kind == "regex":
            fresh = Constraint("regex", constraint.source + "(x)?" * number)
        started = time.perf_counter()
        matcher = compiler.matcher(fresh)
        words = np.empty((1, matcher.words), np.int32)
        _mask(matcher, words)
        first.append(time.perf_counter() - started)
        for token_id in ids:
            started = time.thread_time()
            _mask(matcher, words)
            masks.append(time.thread_time() - started)
            assert words[0, token_id >> 5] >> (token_id & 31) & 1, f"{name}: {token_id} is allowed"
            started = time.thread_time()
            matcher.accept(token_id)
            accepts.append(time.thread_time() - started)
    p50, p99 = np.percentile(1e6 * np.array(masks), [50, 99])
    print(
        f"| {name} | {len(masks)} | {p50:.0f} | {p99:.0f} | {1e6 * max(masks):.0f} "
        f"| {1e6 * np.median(accepts):.0f} | {1e3 * min(first):.1f} |"
    )


def _mask(matcher: Matcher, words: np.ndarray) -> None:
    matcher.inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


def _decode(rounds: int) -> None:
    """Tokens per second of 32 requests, with a schema and without, by turns."""
    prompts = [f"Order {number}: " for number in range(32)]
    ways: dict[str, dict[str, Any]] = {
        "without": {},
        "with the schema": {"constraint": Constraint.json_schema(ORDER)},
        "every token sampled": {"constraint": Constraint.json_schema(ORDER), "logprobs": 0},
    }
    walls: dict[str, list[float]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    with LLM(device="cpu", max_batch_size=32) as llm:
        for number in range(rounds + 1):
            for name, fields in ways.items():
                params = SamplingParams(max_tokens=64, seed=number, ignore_eos=True, **fields)
                started, spent = time.perf_counter(), _engine_seconds(llm)
                made = sum(len(done.token_ids) for done in llm.generate(prompts, params))
                walls[name].append(made / (time.perf_counter() - started))
                costs[name].append(1e3 * (_engine_seconds(llm) - spent) / made)
    print(f"\nDemo model, {torch.get_num_threads()} threads, batch 32, {rounds} rounds:\n")
    print("| decoding | tokens/s, best round | processor ms of the engine's thread per token |")
    print("|---|---|---|")
    for name in ways:
        rate, cost = max(walls[name][1:]), statistics.median(costs[name][1:])
        print(f"| {name} | {rate:.0f} | {cost:.2f} |")


def _engine_seconds(llm: LLM) -> float:
    """Processor time of the batching thread, which every request waits for."""
    return llm.engine.call(lambda _: time.thread_time())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vocabulary", help="GGUF file with a tokenizer; vocab-only will do")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-decode", action="store_true", help="masks alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
