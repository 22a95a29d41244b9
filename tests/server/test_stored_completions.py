"""Stored chat completions. Oracle: the openai SDK's models, and the answer that was given."""

import json

import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion_deleted import ChatCompletionDeleted
from sqlalchemy.orm import Session

URL = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]


@pytest.fixture(params=["sqlite", "postgresql"])
def client(request, make_app, new_store):
    return make_app(**new_store(request.param)).test_client()


@pytest.fixture
def ask(client, model_id):
    def ask(**fields):
        body = {"model": model_id, "messages": QUESTION, "temperature": 0, "max_tokens": 8}
        return client.post(URL, json={**body, "store": True, **fields})

    return ask


def test_stored_completion_is_what_was_answered(client, ask):
    answer = ask(metadata={"a": "b"}, n=2).get_json()
    stored = client.get(f"{URL}/{answer['id']}").get_json()
    assert ChatCompletion.model_validate(stored, strict=True)
    assert stored == {**answer, "metadata": {"a": "b"}}
    messages = client.get(f"{URL}/{answer['id']}/messages").get_json()
    assert [(m["role"], m["content"]) for m in messages["data"]] == [
        ("user", QUESTION[0]["content"])
    ]


def test_streamed_completion_is_stored_before_its_end(client, ask):
    whole = ask().get_json()
    frames = ask(stream=True).text.split("\n\n")
    chunks = [json.loads(f[6:]) for f in frames if f.startswith("data: {")]
    assert frames[-2] == "data: [DONE]"
    stored = client.get(f"{URL}/{chunks[0]['id']}").get_json()
    assert stored["choices"] == whole["choices"]
    assert stored["usage"] == whole["usage"]


def test_what_was_not_to_be_stored_is_not_there(client, ask):
    for fields in ({"store": False}, {"store": None}):
        answer = ask(**fields).get_json()
        assert client.get(f"{URL}/{answer['id']}").status_code == 404
    assert client.get(URL).get_json()["data"] == []


def test_list_by_metadata_and_model(client, ask, model_id):
    first, second, third = (ask(metadata=m).get_json()["id"] for m in ({"k": "1"}, {"k": "2"}, {}))

    def listed(query):
        return [c["id"] for c in client.get(f"{URL}?{query}").get_json()["data"]]

    assert listed("") == [first, second, third]
    assert listed("order=desc&limit=2") == [third, second]
    assert listed(f"after={first}") == [second, third]
    assert listed("metadata[k]=2") == [second]
    assert listed(f"model={model_id}&metadata[k]=1") == [first]
    assert listed("model=other") == []
    for odd in ('metadata["]=1', "metadata[k]=%00", "model=%00", "metadata[$.a]=1"):
        assert client.get(f"{URL}?{odd}").status_code == 200


def test_metadata_changes_and_completion_goes(client, ask):
    path = f"{URL}/{ask().get_json()['id']}"
    changed = client.post(path, json={"metadata": {"x": "y"}}).get_json()
    assert ChatCompletion.model_validate(changed, strict=True).metadata == {"x": "y"}
    assert client.get(path).get_json() == changed
    deleted = client.delete(path).get_json()
    ChatCompletionDeleted.model_validate(deleted, strict=True)
    for answer in (client.get(path), client.delete(path), client.get(f"{path}/messages")):
        assert answer.status_code == 404
    assert client.post(path, json={"metadata": {"x": 1}}).status_code == 400


@pytest.fixture
def full_disk(client):
    """SQLite's page limit makes the same error as a full disk."""
    store = client.application.extensions["store"]

    def set_limit(session: Session) -> None:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 1")

    store.write(set_limit)


@pytest.mark.parametrize("client", ["sqlite"], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [URL, "/v1/responses"])
def test_full_disk_is_told_before_the_end(client, full_disk, model_id, path, stream):
    text = "x " * 4000  # more than fits into what is left of the database's pages
    body = {"messages": [{"role": "user", "content": "x"}], "metadata": {}, "store": True}
    if path != URL:
        body = {"input": "x", "instructions": "y"}
    bulk = {"metadata": {str(n): text[:512] for n in range(16)}}
    body = {"model": model_id, **body, **bulk, "stream": stream}
    answer = client.post(path, json=body)
    if not stream:
        assert (answer.status_code, answer.get_json()["error"]["code"]) == (
            503, "store_unavailable",
        )  # fmt: skip
        return
    assert "the disk is full" in answer.text
    if path == URL:
        assert '"code":"store_unavailable"' in answer.text
    else:
        assert answer.text.count("event: response.failed") == 1
        assert "response.completed" not in answer.text
