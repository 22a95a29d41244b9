"""Ticks of the drawn roofline: a scale read off them puts roof and kernels in place."""

import math
import re
from types import SimpleNamespace

import pytest

from oxillama_torch.bench.ceilings import Ceilings
from oxillama_torch.profile.html import _roofline

CEILINGS = Ceilings(1e10, 1e12, "float32")
KERNELS = {"thin": (2e6, 4e6, 5e-4), "dense": (1e9, 2e6, 2e-3)}  # flops, bytes, seconds
TICK = r'<path d="M([\d.]+) ([\d.]+) {mark}"[^>]*/><text[^>]*>1e(-?\d+)</text>'


@pytest.fixture(scope="module")
def drawing():
    lines = [
        SimpleNamespace(name=name, flops=flops, nbytes=nbytes, seconds=seconds)
        for name, (flops, nbytes, seconds) in KERNELS.items()
    ]
    return _roofline(lines, CEILINGS)


def ticks(drawing, mark, coordinate):
    found = re.findall(TICK.format(mark=mark), drawing)
    return {int(tick[2]): float(tick[coordinate]) for tick in found}


def value(places, at):
    """What a position means on a logarithmic axis, read off its outermost ticks."""
    low, high = min(places), max(places)
    share = (at - places[low]) / (places[high] - places[low])
    return 10 ** (low + share * (high - low))


@pytest.mark.parametrize(("mark", "coordinate", "sign"), [("v5", 0, 1), ("h-5", 1, -1)])
def test_decades_are_whole_ordered_and_evenly_spaced(drawing, mark, coordinate, sign):
    places = ticks(drawing, mark, coordinate)
    assert len(places) >= 3
    exponents = sorted(places)
    assert exponents == list(range(exponents[0], exponents[-1] + 1))
    steps = [sign * (places[n + 1] - places[n]) for n in exponents[:-1]]
    assert min(steps) > 0
    assert max(steps) - min(steps) <= 0.2 + 1e-6  # positions are printed to a tenth


def test_roof_and_kernels_lie_where_the_ticks_say(drawing):
    across, up = ticks(drawing, "v5", 0), ticks(drawing, "h-5", 1)
    roof = re.search(r'<polyline points="([^"]*)"', drawing)[1].split()
    ridge = [float(part) for part in roof[1].split(",")]
    wanted = [(CEILINGS.matmul / CEILINGS.copy, CEILINGS.matmul, *ridge)]
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>(\w+)<', drawing)
    assert {name for _, _, name in circles} == set(KERNELS)
    for x, y, name in circles:
        flops, nbytes, seconds = KERNELS[name]
        wanted.append((flops / nbytes, flops / seconds, float(x), float(y)))
    for intensity, rate, x, y in wanted:
        assert math.isclose(value(across, x), intensity, rel_tol=0.02)
        assert math.isclose(value(up, y), rate, rel_tol=0.02)
