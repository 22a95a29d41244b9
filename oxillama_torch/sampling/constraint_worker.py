"""The process that tries constraints out: ``python -m oxillama_torch.sampling.constraint_worker``.

llguidance bounds most of what a grammar can cost, not all: some take minutes to compile, gigabytes,
or the stack, and with it the process. So each is compiled here first, under limits the kernel
enforces, and followed for a few steps. One JSON object per line comes in and one goes out:

    {"vocab_size": 151936, "special": {"151645": "<|im_end|>"}, "end": [151645], "seconds": 0.2,
     "memory": bytes}                                                                        first
    {"kind": "regex", "source": "a+", "param": "regex"}
    {"grammar": "..."}  or  {"message": "...", "param": "..."}

The vocabulary here has the model's special tokens and single bytes: what a grammar costs to compile
hardly depends on the rest of it.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from llguidance import LLMatcher, LLTokenizer

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_grammar import LIMITS, check_compiled, refusal, to_grammar
from oxillama_torch.workers import confine

__all__ = ["STACK_BYTES", "serve", "try_out"]

#: Less than any thread has that will work with the grammar later on.
STACK_BYTES = 1 << 20
_PROBED_TOKENS = 32
_LONGEST_MASK_S = 0.05


class _Tokens:
    """Special tokens where the model has them, single bytes at other ids."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, setup: Mapping[str, Any]) -> None:
        special = {int(i): spelling.encode() for i, spelling in setup["special"].items()}
        bytes_ = (bytes([byte]) for byte in range(255))
        self.tokens = [
            special[i] if i in special else next(bytes_, b"")
            for i in range(max(setup["vocab_size"], *special, *setup["end"]) + 1)
        ]
        # A model of a few tokens leaves no room for all bytes.
        self.tokens += bytes_
        self.special_token_ids = sorted(special)
        self._of_byte = {data: i for i, data in enumerate(self.tokens) if i not in special}
        self.ids = [i for i, data in enumerate(self.tokens) if data]
        self.eos_token_ids = setup["end"]
        self.eos_token_id = self.eos_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        return [self._of_byte[bytes([byte])] for byte in text.encode()]


def try_out(constraint: Constraint, tokenizer: LLTokenizer, ids: Sequence[int]) -> str:
    """Compile a constraint and follow it for a few tokens, chosen by lot.

    Args:
        constraint: what to try.
        tokenizer: the vocabulary.
        ids: its tokens.

    Returns: its grammar.

    Raises:
        RequestError: it is not sound, allows no text, or costs too much.
    """
    grammar = to_grammar(constraint)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    check_compiled(matcher, constraint)
    lot = random.Random(0)
    for _ in range(_PROBED_TOKENS):
        started = time.thread_time()
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(matcher, constraint.param)
        if time.thread_time() - started > _LONGEST_MASK_S:
            raise RequestError("the constraint takes too long to follow", param=constraint.param)
        allowed = [i for i in ids if mask[i >> 3] >> (i & 7) & 1]
        if not allowed:
            break
        matcher.consume_token(lot.choice(allowed))
        if matcher.is_error():
            raise refusal(matcher, constraint.param)
        if matcher.is_stopped():
            break
    return grammar


def serve(requests: BinaryIO, answers: BinaryIO, setup: Mapping[str, Any]) -> None:
    """Answer requests until there are no more."""
    wrapped = _Tokens(setup)
    tokenizer = LLTokenizer(wrapped, eos_token=wrapped.eos_token_ids)
    _warm_up(tokenizer, wrapped.ids)
    confine(setup["memory"])
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            answer = {"grammar": try_out(Constraint(**json.loads(line)), tokenizer, wrapped.ids)}
        except RequestError as error:
            answer = {"message": error.message, "param": error.param, "code": error.code}
        except MemoryError:
            answer = {"error": "memory"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if "error" in answer:
            return  # what is left of the memory may not do for the next one


def _warm_up(tokenizer: LLTokenizer, ids: Sequence[int]) -> None:
    """Have everything loaded before files and memory are out of reach."""
    for kind, source in (("json_object", ""), ("gbnf", 'root ::= "a"'), ("lark", 'start: "a"')):
        try_out(Constraint(kind, source), tokenizer, ids)


def main() -> None:
    requests = sys.stdin.buffer
    setup = json.loads(requests.readline())
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve, args=(requests, sys.stdout.buffer, setup))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
