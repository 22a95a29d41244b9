"""An engine that has served 100,000 requests holds no more than one that has served 20,000.

The requests differ in length, sampling and prompt; some share a prefix, some are cancelled. Oracle:
Python's own count of objects, and the resident memory of the process.
"""

from __future__ import annotations

import gc

import psutil
import pytest
from engine_driver import Driver, request_for
from recorded_calls import RecordedCalls
from scripted_model import ScriptedModel

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine

BATCH = 64
#: Allocators keep what they have had: of 80,000 requests, less than 200 bytes each.
MOST_BYTES = 16 << 20

KINDS = (
    {},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 1},
    {"logit_bias": {9: 2.0}},
)


def serve(run: Driver, numbers: range) -> None:
    """Requests in waves of 64; every 17th is cancelled while it runs."""
    for start in range(numbers.start, numbers.stop, BATCH):
        for number in range(start, min(start + BATCH, numbers.stop)):
            shared = [5 + number % 3] * 16 if number % 2 else []
            prompt = [*shared, *(5 + (number // 50**i) % 50 for i in range(1 + number % 4))]
            one = request_for(prompt, seed=number, max_tokens=1 + number % 3,
                              **KINDS[number % len(KINDS)])  # fmt: skip
            request_id = run.add(one)
            if number % 17 == 0:
                run.step()
                run.cancel(request_id)
        run.run()
        run.events.clear()
        run.engine.model.batches.clear()


def held() -> tuple[int, int]:
    """Objects that the collector knows, and bytes of resident memory."""
    gc.collect()
    return len(gc.get_objects()), psutil.Process().memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("graphs", [False, True], ids=["kernel by kernel", "on lines"])
def test_nothing_grows_over_100000_requests(graphs, capsys):
    config = EngineConfig(page_size=16, kv_pages=256, max_batch_size=BATCH, graph_prompt_tokens=0)
    run = Driver(Engine(ScriptedModel(), config, graphs=RecordedCalls() if graphs else None))
    serve(run, range(20_000))
    found = [held()]
    for start in range(20_000, 100_000, 20_000):
        serve(run, range(start, start + 20_000))
        found.append(held())
    with capsys.disabled():
        print("\nrequests: objects, MiB resident")
        for number, (objects, resident) in enumerate(found):
            print(f"{20_000 * (number + 1)}: {objects}, {resident / 2**20:.1f}")
    stats = run.engine.stats()
    assert run.engine.completed == 100_000 and stats["pages_used"] == 0
    assert stats["failed"] == 0 and stats["cancelled"] > 1000
    assert abs(found[-1][0] - found[0][0]) < 1000, "objects"
    assert found[-1][1] - found[0][1] < MOST_BYTES, "resident bytes"
