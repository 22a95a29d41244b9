"""Embeddings. Oracles: a tiny HuggingFace model with the same weights, the openai SDK's client."""

import base64
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from openai.types import CreateEmbeddingResponse
from tiny_models import write_tiny
from waiting import PATIENCE_S, idle, until

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import CapacityError
from oxillama_torch.llm import LLM
from oxillama_torch.server.app import close_app, create_app
from oxillama_torch.server.embedding import Embedding, unit_length
from oxillama_torch.server.output import ClientGone

TEXTS = ["to be or not to be", "x", "def add(a, b):\n    return a + b\n" * 3]
POOL = {
    "last": lambda hidden: hidden[-1],
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model and its twin in transformers. Named so that the demo model is not loaded."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    twin = write_tiny("llama", path)
    with LLM(path, device="cpu", max_batch_size=8, max_batch_tokens=64, inbox_size=16) as llm:
        yield llm, twin


@pytest.fixture
def app(tiny):
    app = create_app(ServerConfig(), tiny[0])
    yield app
    close_app(app)


@pytest.fixture
def ask(app, tiny):
    def ask(**fields):
        body = {"model": tiny[0].name, "encoding_format": "float", **fields}
        return app.test_client().post("/v1/embeddings", json=body)

    return ask


def expected(twin, ids, pooling="last", dimensions=None):
    with torch.no_grad():
        hidden = twin.model(torch.tensor([ids])).last_hidden_state[0]
    vector = POOL[pooling](hidden)[:dimensions]
    return torch.nn.functional.normalize(vector, dim=0).numpy()


def vectors(response):
    assert response.status_code == 200, response.get_json()
    answer = CreateEmbeddingResponse.model_validate(response.get_json())
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [np.array(item.embedding, np.float32) for item in answer.data]


@pytest.mark.parametrize("pooling", POOL)
def test_as_transformers_has_it(ask, tiny, pooling):
    llm, twin = tiny
    for text, vector in zip(TEXTS, vectors(ask(input=TEXTS, pooling=pooling))):
        wanted = expected(twin, llm.tokenize(text), pooling)
        np.testing.assert_allclose(vector, wanted, rtol=1e-4, atol=1e-5)


def test_every_form_of_input(ask, tiny):
    ids = [tiny[0].tokenize(text) for text in TEXTS]
    forms = [TEXTS[0], [TEXTS[0]], ids[0], [ids[0]]]
    answers = [ask(input=form) for form in forms]
    assert len({vectors(answer)[0].tobytes() for answer in answers}) == 1
    counts = {answer.get_json()["usage"]["prompt_tokens"] for answer in answers}
    assert counts == {len(ids[0])}
    whole = ask(input=ids).get_json()
    assert whole["usage"] == {k: sum(map(len, ids)) for k in ("prompt_tokens", "total_tokens")}


def test_base64_holds_the_same_bits(ask):
    [plain] = vectors(ask(input="x"))
    data = ask(input="x", encoding_format="base64").get_json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(data), "<f4").tobytes() == plain.tobytes()


def test_dimensions_cut_and_the_rest_has_length_one(ask, tiny):
    [vector] = vectors(ask(input="x", dimensions=7))
    np.testing.assert_allclose(
        vector, expected(tiny[1], tiny[0].tokenize("x"), dimensions=7), rtol=1e-4, atol=1e-5
    )
    assert ask(input="x", dimensions=10_000).get_json()["error"]["param"] == "dimensions"


def test_more_inputs_than_the_engine_lets_wait(ask, tiny):
    """The inbox has room for 16; the same input has the same bits wherever it stands."""
    texts = [TEXTS[i % 3] for i in range(100)]
    found = vectors(ask(input=texts))
    assert len({(i % 3, v.tobytes()) for i, v in enumerate(found)}) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": ["x", ""]}, "input[1]"),
        ({"input": [[5], []]}, "input[1]"),
        ({"input": [5, -1]}, "input[0]"),
        ({"input": [[5], [10**9]]}, "input[1]"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [[5], [5] * 600]}, "input[1]"),
        ({"input": 5}, "input"),
        ({"input": ["x", 5]}, None),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "pooling": "sum"}, "pooling"),
        ({}, "input"),
    ],
)
def test_bad_field_is_named(ask, fields, param):
    response = ask(**fields)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param or param is None


def test_unknown_model_is_404(ask):
    assert ask(input="x", model="other").status_code == 404


def test_full_inbox_is_429(ask, tiny, monkeypatch):
    def full(request, outbox=None):
        raise CapacityError("too many requests waiting", retry_after_s=2.3)

    monkeypatch.setattr(tiny[0].engine, "submit", full)
    response = ask(input="x")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "3")


def test_a_client_that_leaves_takes_its_inputs_with_it(app, tiny):
    service = app.extensions["service"]
    work = Embedding(service, [[5] * 500] * 200, "mean")
    seen = []

    def read():
        with pytest.raises(ClientGone):
            seen.extend(work.outputs())

    reader = threading.Thread(target=read)
    reader.start()
    work.client_gone()
    reader.join(PATIENCE_S)
    assert not reader.is_alive() and len(seen) < 200
    until(lambda: idle(tiny[0].engine), "inputs of a client that has gone are still computed")


def test_the_deadline_ends_it(app):
    work = Embedding(app.extensions["service"], [[5] * 500] * 50, "mean", time.monotonic() - 1)
    with pytest.raises(Exception, match="took too long"):
        list(work.outputs())


def test_lengths():
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [3e38, 3e38]], np.float32)
    np.testing.assert_allclose(unit_length(rows), [[0.6, 0.8], [0, 0], [0.5**0.5] * 2], rtol=1e-6)


def test_the_sdks_client_reads_it(app, tiny):
    from openai import OpenAI

    transport = httpx.WSGITransport(app=app.wsgi_app)
    with httpx.Client(transport=transport) as http_client:
        client = OpenAI(api_key="x", base_url="http://test/v1", http_client=http_client)
        answer = client.embeddings.create(model=tiny[0].name, input=TEXTS)
    np.testing.assert_allclose(
        answer.data[0].embedding,
        expected(tiny[1], tiny[0].tokenize(TEXTS[0])),
        rtol=1e-4,
        atol=1e-5,
    )
