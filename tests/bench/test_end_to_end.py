"""oxillama_torch/bench/end_to_end.py and ``oxillama bench``: the real engine on a tiny model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from oxillama_torch.bench.end_to_end import Stopwatch, measure_model
from oxillama_torch.bench.synthetic import write_synthetic
from oxillama_torch.cli.main import app


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    write_synthetic(path, "tiny")
    return path


def test_every_request_is_timed_to_its_last_token(tiny):
    seen = []
    row = measure_model(
        tiny,
        batch_size=3,
        prompt_tokens=20,
        new_tokens=4,
        runs=2,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (row["batch_size"], row["prompt_tokens"], row["runs"]) == (3, 20, 2)
    assert row["ttft_s"] > 0 and row["prefill_tok_s"] > 0 and row["decode_tok_s"] > 0


def test_adapters_are_timed_beside_none(tiny):
    options = {"batch_size": 3, "prompt_tokens": 8, "new_tokens": 4, "runs": 1, "device": "cpu"}
    row = measure_model(tiny, adapters=2, rank=5, **options)
    assert row["adapters"] == 2 and row["bare_decode_tok_s"] > 0
    cost = row["bare_decode_tok_s"] / row["decode_tok_s"] - 1
    assert row["adapter_cost"] == pytest.approx(cost)
    assert "adapter_cost" not in measure_model(tiny, **options)


def test_rates_count_tokens_between_the_right_moments():
    watch = Stopwatch(2)
    watch._started = 10.0
    # The second request waits for its first token until 13: what came before is not decoding.
    watch._times = [[11.0, 12.0, 13.0, 14.0], [13.0, 14.0, 15.0]]
    assert watch.wait(prompt_tokens=30) == {
        "ttft_s": 2.0,
        "prefill_tok_s": 20.0,
        "decode_tok_s": 1.5,
    }


def test_command_prints_a_table_and_writes_json(tiny, tmp_path):
    arguments = ["-m", str(tiny), "-p", "8", "-n", "2", "--runs", "1", "-b", "1", "-b", "2"]
    arguments += ["--device", "cpu", "--adapters", "1", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    assert "decode" in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["batch_size"] for row in written["rows"]] == [1, 2]
    assert all(row["adapter_cost"] > -1 for row in written["rows"])
    assert written["machine"]["torch"]
