"""Decode steps with adapters on lines: the bits of the plain path, whoever has which adapter.

Oracle: the same requests in an engine that launches every step kernel by kernel, compared with
``==``, log-probabilities too. Graphs are recorded by ``RecordedCalls``. The ``lora`` op is a plain
one that knows of the adapters what a graph could know: addresses in tensors; in one slow test it is
the Triton one, interpreted.
"""

from __future__ import annotations

import pytest
import torch
from engine_driver import Driver, tokens_of
from recorded_calls import RecordedCalls
from tiny_adapters import ALL_LINEAR, save_adapter
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.adapter_lines import AdapterLines
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.lora.op import ROW_TILE, FactorTable
from oxillama_torch.lora.merge import Merge, Merger
from oxillama_torch.lora.registry import AdapterRegistry
from oxillama_torch.lora.targets import Targets
from oxillama_torch.models.loader import load_model
from oxillama_torch.sampling.params import SamplingParams

TABLES: dict[int, FactorTable] = {}  # by address


def by_address(y, x, groups, first, sizes):
    """As the Triton backend: tiles say where the tables are, and where the rows."""
    for address, start, stop in groups.tiles.tolist():
        if start == stop:
            continue
        rows, scales = groups.rows[start:stop], groups.scales[start:stop, None]
        tile, begin = x.new_zeros(ROW_TILE, x.shape[1]), 0
        tile[: len(rows)] = x[rows]
        for entry, size in zip(TABLES[address].entries[first : first + len(sizes)], sizes):
            if entry is not None:
                term = tile @ entry.a.planes["w"].T @ entry.b.planes["w"].T
                y[rows, begin : begin + size] += scales * term[: len(rows)]
            begin += size


@pytest.fixture(autouse=True, scope="module")
def adapters_by_address():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Kernels register when their module is first imported: into the copy they would be lost.
        kernels = {op: dict(registry._backends(op)) for op in registry.registered_ops()}
        patch.setattr(registry, "_KERNELS", kernels)
        registry.register("lora", "by_address", takes_lines=True)(by_address)
        with registry.use_kernels("lora=by_address"):
            yield
    registry.forget_choices()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model and the registry of its adapters: ranks 4, 20 and 4, one of attention alone."""
    folder = tmp_path_factory.mktemp("lora")
    oracle = write_tiny("llama", folder / "tiny.gguf", type_name="F32", num_hidden_layers=1)
    with read_gguf(folder / "tiny.gguf") as gguf:
        model = load_model(gguf)
    adapters = AdapterRegistry(Targets(model))
    every = [*ALL_LINEAR, "lm_head"]
    save_adapter(oracle, folder / "a", seed=1)
    save_adapter(oracle, folder / "b", seed=2, r=20, targets=every)
    save_adapter(oracle, folder / "q", seed=3, targets=["q_proj"])
    save_adapter(oracle, folder / "dora", seed=4, use_dora=True)
    for name in ("a", "b", "q", "dora"):
        adapters.load(name, folder / name)
    for name in ("c", "d"):
        adapters.load(name, folder / "a")
    for name in adapters.names():
        table = adapters.get(name).table
        TABLES[table.addresses.data_ptr()] = table
    return model, adapters


def driver(loaded, device=None, **config) -> Driver:
    model, adapters = loaded
    config = EngineConfig(
        **{"page_size": 16, "kv_pages": 64, "max_batch_size": 6, "graph_prompt_tokens": 0, **config}
    )
    return Driver(Engine(model, config, adapters=adapters, graphs=device))


def request(number: int, *adapters: tuple[str, float], max_tokens: int = 10, **params):
    params = {"temperature": 1.0, "seed": number, "logprobs": 1, **params}
    return GenerationRequest(
        prompt_token_ids=tuple(8 + (5 * number + 3 * j) % 300 for j in range(2 + 3 * number)),
        params=SamplingParams(max_tokens=max_tokens, **params),
        adapters=adapters,
    )


def mixed() -> list[GenerationRequest]:
    return [
        request(0, ("a", 1.0), max_tokens=14),
        request(1, max_tokens=12),
        request(2, ("a", 0.5), ("b", -1.0), max_tokens=9),
        request(3, ("q", 2.0), max_tokens=16, repetition_penalty=1.3),
        request(4, ("b", 1.0), max_tokens=5, temperature=0),
        request(5, ("q", 1.0), ("c", 0.5), ("a", 1.0), ("b", 0.25), max_tokens=7),
    ]


def test_bits_are_those_of_the_plain_path(loaded):
    expected = driver(loaded).run(*mixed())
    run = driver(loaded, RecordedCalls())
    assert run.run(*mixed()) == expected
    stats = run.engine.stats()
    assert stats["graph_steps"] >= 15 and stats["steps_ahead"] > 5
    alone = [driver(loaded, RecordedCalls()).run(one)[0] for one in mixed()[1:3]]
    assert alone == expected[1:3], "whatever else is in the batch"


@pytest.mark.slow
def test_bits_with_the_kernels_that_a_graph_holds(loaded):
    triton_support = pytest.importorskip("oxillama_torch.kernels.triton_support")
    if not triton_support.INTERPRET:
        pytest.skip("the real thing is tested on a GPU")
    with registry.use_kernels("lora=triton"):
        test_bits_are_those_of_the_plain_path(loaded)


def test_requests_come_and_go_and_take_turns_on_lines(loaded):
    """Joins, leaves, cancellations, pages running out; lines change their adapters each time."""
    choices = [(), (("a", 1.0),), (("b", 0.5),), (("a", 0.25), ("q", 1.0))]
    plan = [(3 * i, request(i % 5, *choices[i % 4], max_tokens=4 + i % 7)) for i in range(10)]
    cancelled = {4: 17, 7: 25}  # number -> step

    def play(run: Driver) -> list[list]:
        for step in range(200):
            for number, (at, one) in enumerate(plan):
                if at == step:
                    run.add(one)
                if cancelled.get(number) == step:
                    run.cancel(one.request_id)
            if step > 30 and not run.engine.has_work:
                return [run.events[one.request_id] for _, one in plan]
            run.step()
        raise AssertionError("requests do not come to an end")

    expected = [driver(loaded).run(one)[0] for _, one in plan]
    run = driver(loaded, RecordedCalls(), max_batch_size=3, kv_pages=5, prefix_cache=False)
    for number, (found, wanted) in enumerate(zip(play(run), expected)):
        if number in cancelled:
            assert tokens_of(found) == tokens_of(wanted)[: len(tokens_of(found))]
        else:
            assert found[1:] == wanted[1:]
    assert run.engine.stats()["graph_steps"] > 10


def test_a_graph_serves_other_adapters_until_one_needs_more(loaded):
    device = RecordedCalls()
    run = driver(loaded, device, max_batch_size=1)
    run.run(request(0, ("q", 1.0)))
    assert device.captures == 1
    run.run(request(0, ("a", 1.0)))
    assert device.captures == 2, "more layers"
    run.run(request(0, ("q", 0.5)), request(1, ("a", 2.0)))
    assert device.captures == 2
    run.run(request(0))
    assert device.captures == 3, "without adapters"
    run.run(request(0, ("b", 1.0)), request(0))
    assert device.captures == 4, "a larger rank, and the head"
    assert run.engine.stats()["graphs"] == 2, "the graph for fewer layers has gone"


def test_merging_drops_graphs_and_attached_adapters_go_on(loaded):
    model, adapters = loaded
    merger = Merger(adapters.targets)

    def play(run: Driver, device: RecordedCalls | None) -> list:
        ids = [run.add(request(0, ("a", 1.0), max_tokens=30)), run.add(request(1, max_tokens=30))]
        for merges in ([Merge(adapters.get("b").adapter, 0.5, "f16")], []):
            # What has been generated when weights change must not hang on who runs ahead.
            while len(tokens_of(run.events[ids[1]])) < (10 if merges else 20):
                run.step()
            parts, _ = merger.prepare(merges)
            merger.swap(parts)
            if device is not None:
                device.invalidate()
            run.engine.forget_prefixes()
        run.run()
        return [run.events[request_id] for request_id in ids]

    device = RecordedCalls()
    found = play(driver(loaded, device), device)
    assert all(len(tokens_of(events)) == 30 for events in found)
    assert device.captures >= 3
    plain = driver(loaded).run(request(0, ("a", 1.0)), request(1))
    again = driver(loaded, RecordedCalls()).run(request(0, ("a", 1.0)), request(1))
    assert again == plain, "unmerged, all is as before"


def test_what_lines_do_not_serve(loaded):
    """Gains, more adapters than rounds, and backends that ask the host: kernel by kernel."""
    every = [(name, 0.5) for name in ("a", "b", "q", "c", "d")]
    for uses in ([("dora", 1.0)], every):
        run = driver(loaded, RecordedCalls())
        assert run.run(request(1, *uses)) == driver(loaded).run(request(1, *uses))
        assert run.engine.stats()["graph_steps"] == 0
    with registry.use_kernels("lora=reference"):
        run = driver(loaded, RecordedCalls())
        run.run(request(1, ("a", 1.0)))
        assert run.engine.stats()["graph_steps"] == 0


def test_lines_are_written_only_when_they_change(loaded, monkeypatch):
    _, adapters = loaded
    a, b = adapters.get("a"), adapters.get("b")
    state = AdapterLines(adapters.targets.numbers, 3, torch.device("cpu"), torch.float32,
                         "invariant")  # fmt: skip
    copies = []
    copy = AdapterLines._copy
    monkeypatch.setattr(
        AdapterLines, "_copy", lambda self, uses: (copies.append(uses), copy(self, uses))
    )
    first = state.write([[(a, 1.0)], [], [(b, 0.5), (a, 2.0)]])
    assert state.write([[(a, 1.0)], [], [(b, 0.5), (a, 2.0)]]) == first
    assert len(copies) == 1 and first.rounds == 2 and first.rank == 32
    assert state.write([[(a, 1.0)], [], [(b, 0.25)]]) == first._replace(rounds=1)
    assert len(copies) == 2
    tiles = state._places[0, :9].view(3, 3).tolist()
    assert [tile[1:] for tile in tiles] == [[0, 1], [1, 2], [0, 0]]
    assert tiles[0][0] == a.table.addresses.data_ptr()
    assert state._places[0, 9:].tolist() == [0, 2, 0]
    assert state._scales[0].tolist() == [1.0, 0.25, 0.0]
