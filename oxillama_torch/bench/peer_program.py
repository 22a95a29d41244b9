"""One other engine, timed from outside: run as a file by any interpreter that has its package.

``python peer_program.py llama_cpp FILE --threads 2 --prompt-tokens 64 --new-tokens 16`` loads the
file and says so in one line of JSON. Then each line on the standard input, a seed, runs one round
and is answered by another line of JSON: ``prefill_tok_s`` and ``decode_tok_s``. It ends with its
input. The tokens are random and drawn greedily, for one request at a time.

Nothing of oxillama_torch is imported: it need not be installed beside the peer.
"""

import argparse
import importlib.metadata
import json
import random
import string
import sys
import time


class LlamaCpp:
    """The ``llama_cpp`` wheel, through llama_decode itself: no text, no sampler chain."""

    distribution = "llama-cpp-python"

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp
        import numpy

        tokens = options.prompt_tokens + options.new_tokens
        self._llm = llama_cpp.Llama(
            options.file,
            n_ctx=max(512, tokens + 8),
            n_batch=max(512, options.prompt_tokens),
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
        )
        self._logits, self._as_array = llama_cpp.llama_get_logits_ith, numpy.ctypeslib.as_array
        self._options = options

    def measure(self, seed: int) -> dict[str, float]:
        llm, options, rng = self._llm, self._options, random.Random(seed)
        prompt = [rng.randrange(llm.n_vocab()) for _ in range(options.prompt_tokens)]
        llm.reset()
        started = time.perf_counter()
        llm.eval(prompt)
        token = self._likeliest()
        first = time.perf_counter()
        for _ in range(options.new_tokens):
            llm.eval([token])
            token = self._likeliest()
        return rates(options, first - started, time.perf_counter() - first)

    def _likeliest(self) -> int:
        logits = self._logits(self._llm.ctx, -1)
        return int(self._as_array(logits, shape=(self._llm.n_vocab(),)).argmax())


class OxiLLaMa:
    """The ``oxillama`` wheel.

    It takes text alone. A prompt of P letters is P tokens of a synthetic model, whose vocabulary
    has no merges for them. Answered twice, with one token and with more: the difference is
    decoding.
    """

    distribution = "oxillama"

    def __init__(self, options: argparse.Namespace) -> None:
        import oxillama_py

        tokens = options.prompt_tokens + options.new_tokens
        config = oxillama_py.EngineConfig(
            options.file, context_size=max(512, tokens + 8), num_threads=options.threads
        )
        self._api, self._options = oxillama_py, options
        self._engine = oxillama_py.Engine(config)
        self._engine.load_model()
        self._answer("a", 1)  # reads the file's pages in, which would pass for prefill

    def measure(self, seed: int) -> dict[str, float]:
        options = self._options
        letters = "".join(c for c in string.ascii_letters if c not in "zq")
        prompt = "".join(random.Random(seed).choices(letters, k=options.prompt_tokens))
        if len(self._engine.tokenize(prompt)) != options.prompt_tokens:
            raise SystemExit("a letter is not a token of this model: use a synthetic one")
        before = self._answer(prompt, 1)
        decode = self._answer(prompt, 1 + options.new_tokens) - before
        if decode <= 0:
            raise SystemExit("the longer answer took less time: the machine is too busy to tell")
        return rates(options, before, decode)

    def _answer(self, prompt: str, tokens: int) -> float:
        """Seconds."""
        self._engine.reset()
        sampler = self._api.SamplerConfig(temperature=0.0, top_k=1)
        started = time.perf_counter()
        outcome = self._engine.generate_detailed(
            prompt, self._api.GenerationConfig(tokens, sampler=sampler)
        )
        seconds = time.perf_counter() - started
        if outcome.completion_tokens() != tokens:
            raise SystemExit("the answer ended early")
        return seconds


PEERS = {"llama_cpp": LlamaCpp, "oxillama": OxiLLaMa}


def rates(options: argparse.Namespace, prefill: float, decode: float) -> dict[str, float]:
    """Tokens per second of both phases, from their seconds."""
    return {
        "prefill_tok_s": options.prompt_tokens / prefill,
        "decode_tok_s": options.new_tokens / decode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("file")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    kind = PEERS[options.peer]
    try:
        version = importlib.metadata.version(kind.distribution)
    except importlib.metadata.PackageNotFoundError:
        say({"missing": f"{kind.distribution} is not installed for {sys.executable}"})
        return
    peer = kind(options)
    say({"version": version})
    for line in sys.stdin:
        say(peer.measure(int(line)))


def say(message: dict) -> None:
    """One line of JSON."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
