"""scripts/bench_hostile.py and its requests. Oracle: what the server reads at all; rows made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))  # the scripts import each other by name
    try:
        import bench_hostile
        import hostile_requests
    finally:
        sys.path.remove(str(SCRIPTS))
    return bench_hostile, hostile_requests


def test_every_request_is_small_enough_to_be_looked_at(scripts):
    """A body over the limit is refused by its length: nothing of it would be tried."""
    requests = list(scripts[1].hostile_requests())
    assert len({request.kind for request in requests}) == len(requests) > 35
    assert {r.kind: len(r.body) for r in requests if len(r.body) > 4 * 1024 * 1024} == {}


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, ""),
        ({"gap_ms": 150.1}, "too long"),
        ({"statuses": ["400", "500"]}, "no sound answer"),
        ({"statuses": ["TimeoutError"]}, "no sound answer"),
        ({"broken": "status 503"}, "the stream broke: status 503"),
    ],
)
def test_what_is_wrong_with_a_row(scripts, changed, wrong):
    row = {"kind": "x", "statuses": ["400"], "seconds": 0.1, "gap_ms": 90.0, "broken": None}
    assert scripts[0].problem(row | changed, limit_ms=150) == wrong


def test_the_longest_gap_is_the_one_since_and_the_one_that_goes_on(scripts, monkeypatch):
    now = 100.0
    monkeypatch.setattr(scripts[0].time, "monotonic", lambda: now)
    bystander = scripts[0].Bystander(port=0)
    bystander._gaps = [(10.0, 9.0), (60.0, 0.5), (70.0, 0.7)]
    assert bystander.longest(since=50.0) == 0.7
    bystander._last = 98.0
    assert bystander.longest(since=50.0) == 2.0
