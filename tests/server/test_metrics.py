"""/ready, /metrics and the access log. Oracle: prometheus_client's own parser; counted requests."""

import json
import threading
from bisect import bisect_left

from prometheus_client.parser import text_string_to_metric_families

from oxillama_torch.errors import EngineError
from oxillama_torch.server.metering import Meter
from oxillama_torch.server.metrics import GAP_BOUNDS_S
from oxillama_torch.tokenizer.detokenizer import Detokenizer

PROMPT = "import os\n\ndef join("


def scrape(client):
    response = client.get("/metrics")
    assert response.content_type.startswith("text/plain")
    families = text_string_to_metric_families(response.get_data(as_text=True))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def complete(client, model_id, **fields):
    body = {"model": model_id, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, **fields}
    response = client.post("/v1/completions", json=body)
    response.get_data()
    response.close()
    return response


def test_requests_tokens_and_times_are_counted(client, model_id):
    def value(samples, name, **labels):
        return samples.get((name, tuple(sorted(labels.items()))), 0)

    before = scrape(client)
    assert complete(client, model_id).status_code == 200
    assert complete(client, model_id, stream=True, n=2).status_code == 200
    assert complete(client, "nope").status_code == 404
    client.get("/no/such/route").close()
    after = scrape(client)

    def gained(name, **labels):
        return value(after, name, **labels) - value(before, name, **labels)

    endpoint = "/v1/completions"
    assert gained("oxillama_requests_total", endpoint=endpoint, status="200") == 2
    assert gained("oxillama_requests_total", endpoint=endpoint, status="404") == 1
    assert gained("oxillama_requests_total", endpoint="none", status="404") == 1
    assert gained("oxillama_errors_total", code="model_not_found") == 1
    assert gained("oxillama_time_to_first_token_seconds_count") == 3
    assert gained("oxillama_inter_token_latency_seconds_count") == 3 * 7
    assert gained("oxillama_inter_token_latency_seconds_sum") > 0
    assert gained("oxillama_tokens_generated_total", model=model_id) == 24
    assert gained("llamacpp:tokens_predicted_total") == 24
    assert gained("oxillama_prompt_tokens_total", model=model_id) > 0
    assert value(after, "oxillama_kv_pages", model=model_id) > 0
    assert value(after, "oxillama_queue_depth", model=model_id) == 0
    assert value(after, "oxillama_engine_alive", model=model_id) == 1


def test_gaps_fall_into_their_classes():
    meter = Meter()
    meter.tokens(1, None, 10.0)
    for now, gap in enumerate((0.0004, 0.003, 0.05), start=11):
        meter.tokens(1, now - gap, now)
        assert meter._gaps[bisect_left(GAP_BOUNDS_S, gap)] == 1
    assert sum(meter._gaps) == 3
    meter.tokens(3, 20.0, 20.05)
    assert meter._gaps[0] == 3 and sum(meter._gaps) == 6 and meter.completion_tokens == 7


def test_an_error_inside_a_stream_is_counted(client, model_id, llm, monkeypatch):
    def push_all(self, token_ids):
        raise EngineError("scripted")

    monkeypatch.setattr(Detokenizer, "push_all", push_all)
    before = scrape(client)
    assert complete(client, model_id, stream=True).status_code == 200
    name = ("oxillama_errors_total", (("code", "engine_error"),))
    assert scrape(client).get(name, 0) - before.get(name, 0) == 1


def test_ready_follows_draining_while_health_does_not(client):
    assert client.get("/ready").status_code == 200
    client.post("/admin/drain")
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_the_access_log_tells_the_cost_and_not_the_words(make_app, model_id, tmp_path):
    path = tmp_path / "access.jsonl"
    client = make_app(access_log=str(path), api_keys=("very-secret",)).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = "Bearer very-secret"
    complete(client, model_id, prompt="the secret of life", stream=True)
    client.get("/v1/models?api_key=very-secret", headers={"X-Request-Id": "mine"}).close()
    client.get("/health").close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["method"], e["path"], e["status"]) for e in lines] == [
        ("POST", "/v1/completions", 200), ("GET", "/v1/models", 200), ("GET", "/health", 200),
    ]  # fmt: skip
    first = lines[0]
    assert (first["completion_tokens"], first["model"]) == (8, model_id)
    assert first["prompt_tokens"] > 0
    assert first["ms"] > 0
    assert lines[1]["request_id"] == "mine"
    assert len(first["key"]) == 12
    for secret in ("secret", "life", PROMPT):
        assert secret not in path.read_text()


def test_more_requests_than_there_is_room_for_are_503(make_app, model_id):
    app = make_app(max_streams=2)
    first = [
        app.test_client().post(
            "/v1/completions",
            json={"model": model_id, "prompt": "x", "max_tokens": 500, "stream": True,
                  "ignore_eos": True},
        )
        for _ in range(2)
    ]  # fmt: skip
    for stream in (True, False):
        full = complete(app.test_client(), model_id, stream=stream)
        assert full.status_code == 503
        assert full.get_json()["error"]["code"] == "overloaded"
        assert full.headers["Retry-After"]
    for response in first:
        response.close()
    assert complete(app.test_client(), model_id).status_code == 200


def test_scraping_while_serving(client, model_id):
    app, seen = client.application, []

    def work():
        mine = app.test_client()
        for _ in range(5):
            seen.append(complete(mine, model_id).status_code)
            scrape(mine)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [200] * 20
