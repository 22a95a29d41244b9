"""The requests of a load test without a server: what HTTP may cost is measured against this.

    python -m oxillama_torch.bench.bare_engine '[null, 16, 32, 32, 64]'

The arguments are model (null: the demo), requests at once, requests in all, words of a prompt, and
new tokens; tokens per second are printed.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from oxillama_torch.bench.load import Load, prompt_of
from oxillama_torch.llm import LLM
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["tokens_per_second"]


def tokens_per_second(
    llm: LLM, concurrency: int, requests: int, prompt_words: int, new_tokens: int
) -> float:
    """Chat as the load test does, each request from a thread of its own."""
    load = Load(url="", model="", concurrency=concurrency, requests=requests,
                prompt_words=prompt_words, new_tokens=new_tokens)  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)

    def ask(number: int) -> int:
        message = {"role": "user", "content": prompt_of(load, number)}
        return len(llm.chat([message], params).token_ids)

    with ThreadPoolExecutor(concurrency) as threads:
        ask(-1)  # warm up
        started = time.perf_counter()
        tokens = sum(threads.map(ask, range(requests)))
        return tokens / (time.perf_counter() - started)


def main() -> None:
    """Command line, see the module."""
    model, *sizes = json.loads(sys.argv[1])
    with LLM(model) as llm:
        print(tokens_per_second(llm, *sizes))


if __name__ == "__main__":
    main()
