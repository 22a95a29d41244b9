"""Assistants, threads and messages. Oracles: the openai SDK's models and client."""

import pytest
from openai import NotFoundError
from sdk_over_app import sdk_over

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


@pytest.fixture
def sdk(client):
    with sdk_over(client.application) as sdk:
        yield sdk.beta


def strict(found):
    """The object again, if it is one by the SDK's strict models."""
    return type(found).model_validate(found.to_dict(), strict=True)


def test_assistants(sdk, model_id):
    made = strict(
        sdk.assistants.create(
            model=model_id,
            name="Ada",
            instructions="Be brief.",
            tools=[TOOL],
            metadata={"a": "b"},
            temperature=0.5,
            response_format={"type": "text"},
        )
    )
    assert (made.name, made.temperature, made.top_p) == ("Ada", 0.5, 1.0)
    assert made.tools[0].function.name == "add"
    assert sdk.assistants.retrieve(made.id) == made
    changed = strict(sdk.assistants.update(made.id, name="Eve", tools=[], temperature=None))
    assert (changed.name, changed.instructions, changed.tools) == ("Eve", "Be brief.", [])
    assert changed.temperature is None and changed.metadata == {"a": "b"}
    others = [sdk.assistants.create(model=model_id) for _ in range(4)]
    ids = [made.id, *(other.id for other in others)]
    assert [a.id for a in sdk.assistants.list(order="asc", limit=2)] == ids
    page = sdk.assistants.list(before=ids[0], limit=2)
    assert [a.id for a in page.data] == [ids[2], ids[1]]
    gone = strict(sdk.assistants.delete(made.id))
    assert gone.deleted
    with pytest.raises(NotFoundError):
        sdk.assistants.retrieve(made.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_resources": {"file_search": {"vector_store_ids": ["x"]}}}, "tool_resources"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"instructions": 5}, "instructions"),
        ({"model": None}, "model"),
    ],
)
def test_bad_fields_of_assistants_are_named(client, model_id, fields, param):
    response = client.post("/v1/assistants", json={"model": model_id, **fields})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param


def test_unknown_model_is_404(client, model_id):
    assert client.post("/v1/assistants", json={"model": "other"}).status_code == 404


def test_threads_and_messages(sdk):
    thread = strict(
        sdk.threads.create(
            messages=[
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            ],
            metadata={"k": "v"},
        )
    )
    assert sdk.threads.retrieve(thread.id) == thread
    assert strict(sdk.threads.update(thread.id, metadata={"k": "w"})).metadata == {"k": "w"}
    made = strict(sdk.threads.messages.create(thread.id, role="user", content="three"))
    assert made.status == "completed" and made.content[0].text.value == "three"
    listed = [m.content[0].text.value for m in sdk.threads.messages.list(thread.id, limit=2)]
    assert listed == ["three", "two", "one"]
    in_order = list(sdk.threads.messages.list(thread.id, order="asc"))
    assert [strict(m).role for m in in_order] == ["user", "assistant", "user"]
    changed = sdk.threads.messages.update(made.id, thread_id=thread.id, metadata={"x": "y"})
    assert strict(changed).metadata == {"x": "y"}
    assert sdk.threads.messages.retrieve(made.id, thread_id=thread.id) == changed
    assert strict(sdk.threads.messages.delete(made.id, thread_id=thread.id)).deleted
    with pytest.raises(NotFoundError):
        sdk.threads.messages.retrieve(made.id, thread_id=thread.id)
    other = sdk.threads.create()
    with pytest.raises(NotFoundError):  # a message belongs to its thread
        sdk.threads.messages.retrieve(in_order[0].id, thread_id=other.id)
    assert strict(sdk.threads.delete(thread.id)).deleted
    for call in (sdk.threads.retrieve, sdk.threads.delete, sdk.threads.messages.list):
        with pytest.raises(NotFoundError):
            call(thread.id)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"role": "system", "content": "x"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": ""}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": [{"type": "image_file"}]}, "content[0].type"),
        ({"role": "user", "content": "x", "attachments": [{"file_id": "f"}]}, "attachments"),
    ],
)
def test_bad_fields_of_messages_are_named(client, body, param):
    thread = client.post("/v1/threads").get_json()["id"]
    response = client.post(f"/v1/threads/{thread}/messages", json=body)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param
    assert client.post("/v1/threads/thread_none/messages", json=body).status_code in (400, 404)


def test_a_cursor_of_another_list_is_refused(sdk):
    first, second = sdk.threads.create(), sdk.threads.create()
    message = sdk.threads.messages.create(first.id, role="user", content="x")
    with pytest.raises(NotFoundError):
        sdk.threads.messages.list(second.id, after=message.id)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/threads", {}),
        ("/v1/assistants", {}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
    ],
)
def test_fields_that_nothing_reads_are_named(client, model_id, path, body):
    """Also those whose names are no text for a header."""
    response = client.post(path, json={"model": model_id, **body, "toolz": 1, "a\nb": 2, "\xe9": 3})
    assert response.status_code == 200
    named = response.headers["x-ignored-fields"]
    assert named.replace("model, ", "") == r"'a\nb', toolz, '\xe9'"
