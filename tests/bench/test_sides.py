"""oxillama_torch/bench/sides.py, peer_program.py, ``oxillama bench e2e`` and ``bench peers``.

Peers are small packages made here that keep the calls of the real ones: what is tested is the
conversation with a process and the arithmetic. The real wheels run under ``-m llama_cpp`` and,
where ``oxillama`` is installed, by default.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from typer.testing import CliRunner

from oxillama_torch.bench import sides
from oxillama_torch.bench.synthetic import write_synthetic
from oxillama_torch.cli.main import app
from oxillama_torch.errors import EngineError

SIZES = {"prompt_tokens": 6, "new_tokens": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("sides") / "tiny.gguf"
    write_synthetic(path, "tiny")
    return path


class Scripted:
    def __init__(self, name, prefill, decode, log):
        self.name, self._rates, self._log = name, (prefill, decode), log

    def measure(self, seed):
        self._log.append((self.name, seed))
        # The warm-up is far off, and must not count.
        factor = 1000 if seed == 0 else seed
        return {"prefill_tok_s": factor * self._rates[0], "decode_tok_s": factor * self._rates[1]}


def test_sides_take_turns_and_the_first_is_set_against_the_others():
    log, seen = [], []
    pair = [Scripted("ours", 30.0, 8.0, log), Scripted("other", 10.0, 16.0, log)]
    ours, other = sides.by_turns(pair, 3, lambda *done: seen.append(done))
    assert log == [(name, seed) for seed in range(4) for name in ("ours", "other")]
    assert seen == [(n, 8) for n in range(1, 9)]
    assert (ours["side"], ours["prefill_tok_s"], ours["decode_tok_s"]) == ("ours", 60.0, 16.0)
    assert (ours["prefill_ratio"], ours["decode_ratio"]) == (1.0, 1.0)
    assert (other["prefill_ratio"], other["decode_ratio"]) == (3.0, 0.5)
    assert other["decode_rounds"] == [16.0, 32.0, 48.0]


def interpreter(folder, package, version, code):
    """A Python that also finds ``code`` as a package, with its distribution's metadata."""
    (folder / "site").mkdir(parents=True)
    name, _, distribution = package.partition(" of ")
    (folder / "site" / f"{name}.py").write_text(code)
    info = folder / "site" / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
    python = folder / "python"
    site = folder / "site"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


OXILLAMA = """
class EngineConfig:
    def __init__(self, path, context_size, num_threads): assert num_threads == 1
class SamplerConfig:
    def __init__(self, temperature, top_k): pass
class GenerationConfig:
    def __init__(self, tokens, sampler): self.tokens = tokens
class Engine:
    def __init__(self, config): pass
    def load_model(self): pass
    def reset(self): pass
    def tokenize(self, text): return list(text)
    def generate_detailed(self, prompt, config):
        import time
        time.sleep(0.01 * config.tokens)
        return type("Outcome", (), {"completion_tokens": lambda self: config.tokens})()
"""


def test_a_peer_lives_in_its_own_interpreter(tmp_path, tiny):
    python = interpreter(tmp_path, "oxillama_py of oxillama", "9.8", OXILLAMA)
    with sides.Peer(tiny, "oxillama", python=python, threads=1, **SIZES) as peer:
        assert peer.name == "oxillama 9.8"
        for seed in range(2):
            rates = peer.measure(seed)
            assert 0 < rates["prefill_tok_s"] <= 6 / 0.01
    assert peer._process.returncode == 0


def test_a_peer_that_is_not_installed_is_told(tmp_path, tiny):
    python = interpreter(tmp_path, "nothing of nothing", "1.0", "")
    python.write_text(python.read_text().replace('"$@"', '-S "$@"'))
    with pytest.raises(sides.MissingPeer, match="llama-cpp-python is not installed for"):
        sides.Peer(tiny, "llama_cpp", python=python, threads=1, **SIZES)


def test_a_peer_that_fails_is_an_error(tmp_path, tiny):
    code = OXILLAMA.replace("return list(text)", "return list(text) + [0]")
    python = interpreter(tmp_path, "oxillama_py of oxillama", "9.8", code)
    with (
        sides.Peer(tiny, "oxillama", python=python, threads=1, **SIZES) as peer,
        pytest.raises(EngineError, match=r"oxillama 9\.8 ended with code 1"),
    ):
        peer.measure(0)


def test_peers_command_names_what_it_skips_and_prints_the_ratio(tmp_path, tiny):
    python = interpreter(tmp_path, "oxillama_py of oxillama", "9.8", OXILLAMA)
    python.write_text(python.read_text().replace('"$@"', '-S "$@"'))
    arguments = ["-m", str(tiny), "-p", "6", "-n", "2", "--rounds", "1", "--threads", "1"]
    arguments += ["--device", "cpu", "--peer-python", str(python), "--json", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["bench", "peers", *arguments])
    assert result.exit_code == 0, result.output
    assert "llama_cpp: skipped, llama-cpp-python is not installed" in result.output
    ours, other = json.loads((tmp_path / "out").read_text())["rows"]
    assert (ours["side"], other["side"]) == ("oxillama-torch fast", "oxillama 9.8")
    assert other["decode_ratio"] == pytest.approx(ours["decode_tok_s"] / other["decode_tok_s"])


def test_unknown_peers_are_refused(tiny):
    result = CliRunner().invoke(app, ["bench", "peers", "-m", str(tiny), "--peer", "vllm"])
    assert result.exit_code != 0
    assert "llama_cpp" in str(result.output) + str(result.exception)


def test_e2e_command_sets_fast_against_invariant(tmp_path, tiny):
    arguments = ["-m", str(tiny), "-p", "6", "-n", "2", "--rounds", "1", "-b", "1", "-b", "2"]
    arguments += ["--device", "cpu", "--json", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["bench", "e2e", *arguments])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    expected = [("fast", 1), ("invariant", 1), ("fast", 2), ("invariant", 2)]
    assert [(row["side"], row["batch_size"]) for row in rows] == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama_cpp", marks=pytest.mark.llama_cpp),
        pytest.param(
            "oxillama",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("oxillama_py") is None, reason="oxillama not installed"
            ),
        ),
    ],
)
def test_the_real_peers_read_a_synthetic_model(tiny, name):
    with sides.Peer(tiny, name, threads=1, **SIZES) as peer:
        rates = peer.measure(0)
    assert rates["prefill_tok_s"] > 0 and rates["decode_tok_s"] > 0
