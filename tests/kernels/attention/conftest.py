"""Requests with known queries, keys and values, laid out in pages in many ways."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Request:
    """One request's q [L, HQ, D], k [L, HKV, D] and v [L, HKV, DV]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Part:
    """The query tokens [start, stop) of a request whose first ``stop`` tokens are stored."""

    request: Request
    start: int
    stop: int


def _request(length: int, heads: tuple[int, int], dims: tuple[int, int], dtype=torch.float32):
    (hq, hkv), (d, dv) = heads, dims
    # Scores of some size, and keys of different size, so that a wrong order or maximum shows.
    k = torch.randn(length, hkv, d) * torch.linspace(0.5, 2, length)[:, None, None]
    parts = torch.randn(length, hq, d) * 2, k, torch.randn(length, hkv, dv)
    return Request(*(x.to(dtype) for x in parts))


def _paged(parts: list[Part], *, page_size=16, pages_dtype=None, seed=0, extra_width=0):
    """(tensor arguments, lengths) of the op. Whatever no token was written to is poison."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-part.stop // page_size) for part in parts]
    ids = torch.randperm(sum(counts) + 3, generator=generator).int()
    first = parts[0].request
    pages_dtype = pages_dtype or first.k.dtype
    k_pages, v_pages = (
        torch.full((len(ids), page_size, *x.shape[1:]), torch.nan, dtype=pages_dtype)
        for x in (first.k, first.v)
    )
    page_table = torch.full((len(parts), max(counts) + extra_width), -(2**30), dtype=torch.int32)
    for row, (part, count) in enumerate(zip(parts, counts)):
        mine, ids = ids[:count], ids[count:]
        page_table[row, :count] = mine
        for pages, x in ((k_pages, part.request.k), (v_pages, part.request.v)):
            stored = torch.full((count * page_size, *x.shape[1:]), torch.nan, dtype=pages_dtype)
            stored[: part.stop] = x[: part.stop].to(pages_dtype)
            pages[mine.long()] = stored.view(count, *pages.shape[1:])
    q = torch.cat([part.request.q[part.start : part.stop] for part in parts])
    lengths = torch.tensor([0] + [part.stop - part.start for part in parts])
    seq_lens = torch.tensor([part.stop for part in parts], dtype=torch.int32)
    tensors = (q, k_pages, v_pages, page_table, lengths.cumsum(0).int(), seq_lens)
    host = {"max_query_len": int(lengths.max()), "max_seq_len": int(seq_lens.max())}
    return tuple(x.to(DEVICE) for x in tensors), host


def _run(function, parts: list[Part], *, layout: dict | None = None, **arguments):
    """Outputs of ``function`` for each part, on the CPU."""
    tensors, host = _paged(parts, **(layout or {}))
    arguments.setdefault("scale", tensors[0].shape[2] ** -0.5)
    for name in ("sinks", "slopes"):
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = arguments[name].to(DEVICE)
    out = function(*tensors, **host, **arguments).cpu()
    return list(out.split([part.stop - part.start for part in parts]))


def _truth(part: Part, *, window=None, softcap=None, sinks=None, slopes=None) -> torch.Tensor:
    """Plain attention in float64, [tokens, HQ, DV]."""
    q = part.request.q[part.start : part.stop].double()
    group = q.shape[1] // part.request.k.shape[1]
    k, v = (
        x[: part.stop].double().repeat_interleave(group, dim=1)
        for x in (part.request.k, part.request.v)
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(part.start, part.stop)[:, None] - torch.arange(part.stop)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : part.stop]
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.fixture
def flagged():
    """``(flags, heads)`` -> flags with random sinks and ALiBi's slopes where they ask for them."""

    def fill(flags: dict, heads: int) -> dict:
        values = {"sinks": torch.randn(heads), "slopes": 2.0 ** -torch.linspace(1, 4, heads)}
        return {name: values.get(name, value) for name, value in flags.items()}

    return fill


@pytest.fixture
def make_request():
    """``(length, (HQ, HKV), (D, DV), dtype)`` -> a random request."""
    return _request


@pytest.fixture
def part():
    """``(request, start, stop)`` -> a Part."""
    return Part


@pytest.fixture
def run():
    """``(function, parts, layout={...}, **arguments)`` -> the output of each part.

    The layout: ``page_size``, ``pages_dtype``, ``seed`` of the page ids, ``extra_width`` of the
    page table.
    """
    return _run


@pytest.fixture
def truth():
    """``(part, window=, softcap=, sinks=, slopes=)`` -> plain attention in float64."""
    return _truth
