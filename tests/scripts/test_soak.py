"""The soak: what counts as equal, and the whole of it for half a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the scripts are no package; they import each other by name

from soak_cases import folded  # noqa: E402
from soak_load import begins  # noqa: E402
from soak_watch import Sample, slope_per_hour  # noqa: E402


def piece(text, index=0, **more):
    return {"choices": [{"index": index, "text": text, "finish_reason": None, **more}]}


WHOLE = [
    piece("ab", logprobs={"token_logprobs": [-1.0, -2.0]}),
    piece("x", 1),
    piece("c", logprobs={"token_logprobs": [-3.0]}),
    {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
]


def test_pieces_do_not_matter_but_everything_in_them_does():
    whole = folded(WHOLE)
    assert whole["choices"][0]["text"] == "abc" and whole["usage"] == (3, 4)
    assert whole["choices"][0]["logprobs"] == [-1.0, -2.0, -3.0]
    assert whole["choices"][0]["end"] == "length"
    assert folded([WHOLE[1], WHOLE[0], *WHOLE[2:]]) == whole
    for lost in range(len(WHOLE)):
        assert folded(WHOLE[:lost] + WHOLE[lost + 1 :]) != whole, "one is lost"
    for index in range(3):
        twice = WHOLE[: index + 1] + WHOLE[index:]
        assert folded(twice) != whole, "one comes twice"


def test_who_leaves_has_seen_the_beginning():
    whole = folded(WHOLE)
    assert all(begins(whole, folded(WHOLE[:seen])) for seen in range(5))
    assert not begins(whole, folded(WHOLE[2:4])), "the first piece is lost"


def test_token_ids_and_tool_calls_are_compared():
    native = [
        {"content": "a", "tokens": [7], "stop": False},
        {"content": "", "tokens": [7], "stop": True, "stop_type": "limit"},
    ]
    assert folded(native)["choices"][0] == {"text": "a", "ids": [7], "end": "limit"}
    call = {"index": 0, "id": "call-1", "function": {"name": "f", "arguments": "{"}}
    more = {"index": 0, "function": {"arguments": "}"}}
    calls = [{"choices": [{"index": 0, "delta": {"tool_calls": [part]}}]} for part in (call, more)]
    assert folded(calls)["choices"][0]["calls"] == '"f"{}'


def test_growth_is_fitted_behind_the_start():
    mib = 1 << 20
    flat = [Sample(float(i), (500 if i > 10 else 100) * mib, 1, 1, {}) for i in range(100)]
    slope, error = slope_per_hour(flat)
    assert abs(slope) < 1e-6 and error < 1e-6
    growing = [Sample(60.0 * i, (100 + i) * mib, 1, 1, {}) for i in range(100)]
    assert slope_per_hour(growing)[0] == pytest.approx(60, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "options", [["--minutes", "0.5"], ["--short", "500"]], ids=["mixed", "short"]
)
def test_a_short_soak(options):
    command = [sys.executable, SCRIPTS / "soak.py", *options, "--cases", "9", "--clients", "4"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "nothing was lost" in done.stdout
