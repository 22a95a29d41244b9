"""The profiler on the demo model. Oracles: counts and costs worked out from the model's shape."""

import json
from html.parser import HTMLParser

import pytest
import torch

from oxillama_torch.bench.ceilings import Ceilings
from oxillama_torch.bench.cost import cost_of
from oxillama_torch.config import EngineConfig
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels import registry
from oxillama_torch.profile.html import page
from oxillama_torch.profile.run import profile_prompt
from oxillama_torch.profile.summary import by_kernel, by_layer, roofline_seconds

CEILINGS = Ceilings(1e10, 1e11, "float32")
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    trace = tmp_path_factory.mktemp("profile") / "trace.json"
    found = profile_prompt(
        EngineConfig(device="cpu", prefix_cache=False), "import os\n" * 4, NEW_TOKENS, trace
    )
    assert json.loads(trace.read_text())["traceEvents"]
    return found


@pytest.fixture(scope="module")
def config():
    with read_gguf(EngineConfig().model_path) as gguf:
        return dict(gguf.metadata)


def test_every_call_of_every_step_is_there(profile, config):
    layers = config["llama.block_count"]
    assert {r.step for r in profile.phases["prefill"]} == {0}
    assert {r.step for r in profile.phases["decode"]} == set(range(1, NEW_TOKENS))
    attention = [r for r in profile.phases["decode"] if r.op == "attention"]
    assert len(attention) == layers * (NEW_TOKENS - 1)
    assert {r.module for r in attention} == {f"layers.{i}.attention" for i in range(layers)}
    # Layers share one table of frequencies, and each is told what its own rotation costs.
    rotated = {r.module.split(".")[1] for r in profile.phases["decode"] if r.op == "rope_store_kv"}
    assert rotated == {str(i) for i in range(layers)}
    assert all(r.seconds > 0 and r.nbytes > 0 for r in attention)


def test_products_cost_what_the_weights_say(profile):
    """A decode step multiplies each matrix once: 2 operations per weight."""
    with read_gguf(EngineConfig().model_path) as gguf:
        matrices = [t for t in gguf.tensors.values() if len(t.shape) == 2]
    step = [r for r in profile.phases["decode"] if r.step == 1 and r.op == "quant_matmul"]
    assert sum(r.flops for r in step) == sum(2 * t.shape[0] * t.shape[1] for t in matrices)
    weights = sum(t.nbytes for t in matrices)
    assert weights <= sum(r.nbytes for r in step) < 1.1 * weights


def test_attention_cost_counts_visible_keys():
    q = torch.zeros(5, 2, 8)
    pages = torch.zeros(4, 16, 1, 8)
    starts, lens = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([10, 2])
    nbytes, flops = cost_of("attention", (q, pages, pages, None, starts, lens), q)
    seen = (8 + 9 + 10) + (1 + 2)
    assert flops == 2 * seen * 2 * (8 + 8)
    assert nbytes == (10 + 2) * 2 * 8 * 4 + 2 * q.nbytes


def test_shares_add_up(profile, config):
    for records in profile.phases.values():
        kernels, layers = by_kernel(records, CEILINGS), by_layer(records, CEILINGS)
        for lines in (kernels, layers):
            assert sum(line.share for line in lines) == pytest.approx(1)
            assert sum(line.calls for line in lines) == len(records)
        assert sum(line.name.startswith("layer") for line in layers) == config["llama.block_count"]


def test_roofline_is_the_slower_of_two():
    assert roofline_seconds(10**10, 0, CEILINGS) == 1
    assert roofline_seconds(10**10, 2 * 10**11, CEILINGS) == 2


def test_nothing_is_observed_afterwards(profile):
    assert registry._observer is None


def test_page_is_well_formed_and_self_contained(profile):
    phases = {
        name: (by_kernel(records, CEILINGS), by_layer(records, CEILINGS))
        for name, records in profile.phases.items()
    }
    text = page("A <b> & c", {"device": "cpu"}, phases, CEILINGS)

    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], set()

        def handle_starttag(self, tag, attrs):
            self.seen.add(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(text)
    assert {"svg", "table", "polyline"} <= checker.seen
    assert "script" not in checker.seen
    assert "A &lt;b&gt; &amp; c" in text
