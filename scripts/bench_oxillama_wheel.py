"""Time the OxiLLaMa wheel on a file of ``oxillama bench --keep``, as ``oxillama bench`` times us.

For an environment of its own: ``pip install oxillama``, then
``python bench_oxillama_wheel.py FILE --prompt-tokens 128 --new-tokens 32 --threads 2``.
A prompt of P letters is P tokens there, since the synthetic vocabulary has no merges for them.
Prints one JSON line: medians over the runs, after a warm-up.
"""

import argparse
import json
import random
import statistics
import string
import time

import oxillama_py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    config = oxillama_py.EngineConfig(options.file, context_size=1024, num_threads=options.threads)
    engine = oxillama_py.Engine(config)
    engine.load_model()
    rounds = [measure(engine, options, seed) for seed in range(options.runs + 1)][1:]
    print(json.dumps({name: statistics.median(r[name] for r in rounds) for name in rounds[0]}))


def measure(engine: "oxillama_py.Engine", options: argparse.Namespace, seed: int) -> dict:
    """One prompt, answered twice: with one token, then with more; their difference is decoding."""
    letters = "".join(c for c in string.ascii_letters if c not in "zq")
    prompt = "".join(random.Random(seed).choices(letters, k=options.prompt_tokens))
    assert len(engine.tokenize(prompt)) == options.prompt_tokens
    first = generate(engine, prompt, 1)
    rest = generate(engine, prompt, 1 + options.new_tokens)
    result = {}
    # Where other programs use the same cores, only the rates per second of CPU time mean anything.
    for clock, before, after in zip(("", "_cpu"), first, rest):
        result[f"prefill_tok_s{clock}"] = options.prompt_tokens / before
        result[f"decode_tok_s{clock}"] = options.new_tokens / (after - before)
    return result


def generate(engine: "oxillama_py.Engine", prompt: str, tokens: int) -> tuple[float, float]:
    """Seconds by the clock and of CPU time; tokens are counted by the engine, text is not."""
    engine.reset()
    sampler = oxillama_py.SamplerConfig(temperature=0.0, top_k=1)
    clock, cpu = time.perf_counter(), time.process_time()
    outcome = engine.generate_detailed(
        prompt, oxillama_py.GenerationConfig(tokens, sampler=sampler)
    )
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    assert outcome.completion_tokens() == tokens, "the answer ended early"
    return clock, cpu


if __name__ == "__main__":
    main()
