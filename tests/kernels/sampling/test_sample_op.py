"""The sampler on the device against the chain, which has numpy oracles of its own.

The interpreter takes numpy's exponential, a last bit away from torch's here and there: a draw would
have to fall within that bit of a border to differ.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from oxillama_torch.kernels.registry import use_kernels  # noqa: E402
from oxillama_torch.kernels.sampling.op import Penalties, Settings, sample  # noqa: E402
from oxillama_torch.kernels.sampling.reference import uniform  # noqa: E402
from oxillama_torch.sampling.chain import adjust, choose  # noqa: E402
from oxillama_torch.sampling.fixed_point import ONE  # noqa: E402
from oxillama_torch.sampling.logprobs import token_logprobs  # noqa: E402
from oxillama_torch.sampling.params import SamplingParams  # noqa: E402
from oxillama_torch.sampling.philox import uniform as uniform_of_numpy  # noqa: E402
from oxillama_torch.sampling.row import SamplingRow  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
PROMPT, OUTPUT = [3, 9, 9, 40], [9, 2, 2]

CASES = [
    {},
    {"temperature": 0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 7},
    {"top_k": 1},
    {"top_k": 10**6},
    {"top_p": 0.7},
    {"top_p": 0.0},
    {"top_p": 0.999, "min_p": 0.01},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": -0.4, "top_k": 5},
    {"temperature": 0, "repetition_penalty": 3.0},
]


def rows_for(backend: str) -> list[SamplingRow]:
    """Every case several times; the interpreter takes a while for each, so some of them once."""
    rows, numbers = [], range(4 * len(CASES)) if backend == "reference" else range(1, 13, 2)
    for number in numbers:
        params = SamplingParams(seed=number - 5, **CASES[number % len(CASES)])
        rows.append(SamplingRow(params, PROMPT))
        for token_id in OUTPUT:
            rows[-1].accept(token_id)
    return rows


def settings_of(rows: list[SamplingRow], device="cpu") -> tuple[Settings, Penalties]:
    params = [row.params for row in rows]

    def column(name, dtype):
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

    settings = Settings(
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float64),
        column("min_p", torch.float64),
        column("seed", torch.int64),
        torch.tensor([row.position for row in rows], device=device),
    )
    seen = sorted({*PROMPT, *OUTPUT})
    ids = torch.tensor([[*seen, -1]] * len(rows), device=device)
    counts = torch.tensor([[*map(OUTPUT.count, seen), 0]] * len(rows), dtype=torch.int32)
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    penalties = Penalties(ids, counts.to(device), *(column(n, torch.float32) for n in names))
    return settings, penalties


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("vocabulary", "grid"), [(50, 0.5), (5000, None)], ids=["ties", "distinct"]
)
def test_tokens_are_those_of_the_chain(backend, vocabulary, grid, device):
    rows = rows_for(backend)
    logits = torch.randn(len(rows), vocabulary) * 3
    if grid:
        logits = (logits / grid).round() * grid
    logits = logits.to(device)
    settings, penalties = settings_of(rows, device)
    with use_kernels(f"sample={backend}"):
        tokens, belows, totals = sample(logits, settings, penalties=penalties)
    assert torch.equal(tokens, choose(adjust(logits, rows), rows))
    for line, token_id in enumerate(tokens.tolist()):
        [expected] = token_logprobs(logits[line : line + 1], [token_id], 0)
        logprob = float(belows[line]) - math.log(int(totals[line]) / ONE)
        assert logprob == pytest.approx(expected.logprob, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_bans_what_its_bits_leave_out(backend):
    vocabulary, rows = 100, rows_for(backend)
    logits = torch.randn(len(rows), vocabulary)
    allowed = torch.rand(len(rows), vocabulary) < 0.2
    allowed[:, 77] = True
    padded = torch.nn.functional.pad(allowed, (0, 128 - vocabulary), value=True)
    bits = padded.view(len(rows), 4, 32).to(torch.int64) << torch.arange(32)
    bitmask = bits.sum(-1).to(torch.int32)
    settings, penalties = settings_of(rows)
    with use_kernels(f"sample={backend}"):
        tokens, _, _ = sample(logits, settings, bitmask=bitmask, penalties=penalties)
    masked = logits.masked_fill(~allowed, -torch.inf)
    assert torch.equal(tokens, choose(adjust(masked, rows), rows))


def test_uniform_is_that_of_numpy():
    seeds = torch.tensor([0, 1, -1, 1 << 40, -(1 << 62), 12345])
    positions = torch.tensor([0, 1, 7, 1 << 33, 5, 99])
    expected = uniform_of_numpy(seeds.tolist(), positions.tolist())
    assert np.array_equal(uniform(seeds, positions).numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_know_each_other(backend):
    rows = rows_for(backend)
    logits = torch.randn(len(rows), 300) * 3
    settings, _ = settings_of(rows)
    with use_kernels(f"sample={backend}"):
        together = sample(logits, settings)[0].tolist()
        for line in (0, 2, 5):
            one, _ = settings_of([rows[line]])
            assert sample(logits[line : line + 1].clone(), one)[0].tolist() == [together[line]]


def test_operands_that_do_not_fit_are_named():
    rows = rows_for("reference")
    settings, penalties = settings_of(rows)
    logits = torch.randn(len(rows), 50)
    with pytest.raises(ValueError, match="logits"):
        sample(logits.double(), settings)
    with pytest.raises(ValueError, match="temperature"):
        sample(logits[1:], settings)
    with pytest.raises(ValueError, match="bitmask"):
        sample(logits, settings, bitmask=torch.zeros(len(rows), 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="counts"):
        wrong = Penalties(penalties.token_ids, penalties.counts[:, 1:].contiguous(),
                          *(penalties.repetition,) * 3)  # fmt: skip
        sample(logits, settings, penalties=wrong)


@pytest.mark.gpu
def test_a_call_can_be_part_of_a_cuda_graph():
    rows = rows_for("reference")
    settings, penalties = settings_of(rows, "cuda")
    logits = torch.randn(len(rows), 5000, device="cuda") * 3
    for backend in ("reference", "triton"):
        with use_kernels(f"sample={backend}"):
            expected = sample(logits, settings, penalties=penalties)[0]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                tokens = sample(logits, settings, penalties=penalties)[0]
            graph.replay()
            assert torch.equal(tokens, expected)
