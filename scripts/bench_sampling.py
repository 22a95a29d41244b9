"""Time of one step's sampling on the CPU, over the whole chain and by parts of it.

    scripts/bench_sampling.py [--rows 64] [--vocabulary 128256] [--repeats 9] [--cpu-time]

Logits are made so that they look like a model's: a few likely tokens and a long tail. Prints a
Markdown table of medians. With ``--cpu-time``, one thread and the time that it computed: figures
that can be compared even if the machine is busy with other things.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.presets import preset
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.sampler import sample

PROMPT = [token_id * 7919 % 30_000 for token_id in range(512)]


def cases() -> dict[str, SamplingParams]:
    """What requests ask for, from nothing to everything."""
    every = {
        "temperature": 0.9,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "dry_multiplier": 0.8,
        "dry_sequence_breakers": ((13,), (25, 26)),
        "top_n_sigma": 4.0,
        "top_k": 200,
        "typical_p": 0.98,
        "top_a": 0.001,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4,
        "top_p": 0.97,
        "min_p": 0.01,
        "xtc_probability": 0.5,
        "bad_words": ((5, 6), (7,)),
        "logit_bias": {11: 1.0, 12: -1.0},
    }
    return {
        "greedy": SamplingParams(temperature=0),
        "temperature": SamplingParams(temperature=0.8, seed=1),
        "top-p 0.9": SamplingParams(top_p=0.9, seed=1),
        "top-k 40": SamplingParams(top_k=40, seed=1),
        "min-p 0.05": SamplingParams(min_p=0.05, seed=1),
        "preset llama.cpp": preset("llama.cpp", seed=1),
        "preset oxillama": preset("oxillama", seed=1),
        "mirostat 2": SamplingParams(mirostat=2, seed=1),
        "every step": SamplingParams(**every, seed=1),
        "every step, no top-k": SamplingParams(**{**every, "top_k": 0}, seed=1),
    }


def likely_logits(rows: int, vocabulary: int) -> torch.Tensor:
    """float32 [rows, vocabulary]: tails as of a language model, nuclei of 1 to some 100 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 2
    heads = torch.rand(rows, 40, generator=generator) * 12 + 4
    columns = torch.randint(0, vocabulary, (rows, 40), generator=generator)
    return logits.scatter_(1, columns, heads)


def median_ms(
    logits: torch.Tensor, params: SamplingParams, repeats: int, clock: Callable[[], float]
) -> float:
    """Median time of ``sample`` over fresh rows, in milliseconds."""
    seconds = []
    for _ in range(repeats + 1):
        rows = [SamplingRow(params, PROMPT) for _ in range(len(logits))]
        started = clock()
        sample(logits, rows)
        seconds.append(clock() - started)
    return statistics.median(seconds[1:]) * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    logits = likely_logits(arguments.rows, arguments.vocabulary)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{arguments.rows} requests, {arguments.vocabulary} tokens, medians of ms\n")
    print("| sampling | ms |\n|---|---|")
    with torch.inference_mode():
        for name, params in cases().items():
            print(f"| {name} | {median_ms(logits, params, arguments.repeats, clock):.1f} |")


if __name__ == "__main__":
    main()
