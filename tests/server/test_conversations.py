"""``/v1/conversations`` over both stores. Oracle: the openai SDK's models, validated strictly."""

import pytest
from openai.types.conversations import (
    Conversation,
    ConversationDeletedResource,
    ConversationItem,
    ConversationItemList,
)
from pydantic import TypeAdapter

URL = "/v1/conversations"
ITEM = TypeAdapter(ConversationItem)
USER = {"type": "message", "role": "user", "content": "What does `textwrap.dedent` do?"}


@pytest.fixture(params=["sqlite", "postgresql"])
def client(request, make_app, new_store):
    return make_app(**new_store(request.param)).test_client()


@pytest.fixture
def conversation(client):
    """The path of a conversation of two items."""
    items = [USER, {"role": "assistant", "content": "It removes indentation."}]
    answer = client.post(URL, json={"items": items, "metadata": {"a": "b"}})
    made = Conversation.model_validate(answer.get_json(), strict=True)
    assert made.metadata == {"a": "b"}
    return f"{URL}/{made.id}"


def items_of(client, conversation, query="?order=asc"):
    answer = client.get(f"{conversation}/items{query}")
    return ConversationItemList.model_validate(answer.get_json(), strict=True)


def test_conversation_lives_and_goes(client, conversation):
    got = Conversation.model_validate(client.get(conversation).get_json(), strict=True)
    changed = client.post(conversation, json={"metadata": {"c": "d"}}).get_json()
    assert changed == {**got.model_dump(), "metadata": {"c": "d"}}
    assert client.get(conversation).get_json() == changed
    answer = client.delete(conversation).get_json()
    ConversationDeletedResource.model_validate(answer, strict=True)
    for path in (conversation, f"{conversation}/items"):
        assert client.get(path).status_code == 404
    assert client.delete(conversation).status_code == 404


def test_items_come_and_go(client, conversation):
    added = client.post(f"{conversation}/items", json={"items": [USER, USER]})
    new = ConversationItemList.model_validate(added.get_json(), strict=True).data
    listed = items_of(client, conversation)
    assert [item.role for item in listed.data] == ["user", "assistant", "user", "user"]
    assert listed.data[2:] == new
    one = client.get(f"{conversation}/items/{new[0].id}").get_json()
    assert ITEM.validate_python(one, strict=True) == new[0]
    left = client.delete(f"{conversation}/items/{new[0].id}")
    assert Conversation.model_validate(left.get_json(), strict=True)
    assert client.get(f"{conversation}/items/{new[0].id}").status_code == 404
    assert [item.id for item in items_of(client, conversation).data] == [
        *(item.id for item in listed.data[:2]), new[1].id,
    ]  # fmt: skip


def test_pages_of_items(client, conversation):
    client.post(f"{conversation}/items", json={"items": [USER] * 3})
    ids = [item.id for item in items_of(client, conversation).data]
    first = items_of(client, conversation, "?limit=2")
    assert ([item.id for item in first.data], first.has_more) == (ids[:2:-1], True)
    rest = items_of(client, conversation, f"?limit=20&after={first.last_id}")
    assert ([item.id for item in rest.data], rest.has_more) == (ids[2::-1], False)


def test_empty_conversation(client):
    made = client.post(URL, json={}).get_json()
    listed = items_of(client, f"{URL}/{made['id']}")
    assert (listed.data, listed.has_more) == ([], False)


def test_response_reads_and_writes_it(client, conversation, model_id):
    response = client.post(
        "/v1/responses",
        json={
            "model": model_id, "input": "And now?", "max_output_tokens": 5,
            "conversation": {"id": conversation.removeprefix(f"{URL}/")},
        },
    ).get_json()  # fmt: skip
    items = items_of(client, conversation).data
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant"]
    assert items[3].id == response["output"][0]["id"]
    counted = client.post(
        "/v1/responses/input_tokens",
        json={"model": model_id, "input": [USER, {"role": "assistant", "content":
              "It removes indentation."}, {"role": "user", "content": "And now?"}]},
    ).get_json()  # fmt: skip
    assert response["usage"]["input_tokens"] == counted["input_tokens"]
    error = client.post(
        "/v1/responses", json={"model": model_id, "input": "x", "conversation": "conv_none"}
    )
    assert error.status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": 5}, "items"),
        ({"items": [{"role": "user"}]}, "items[0].content"),
        ({"items": [USER] * 21}, "items"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": []}, "metadata"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_field_is_named(client, body, param):
    answer = client.post(URL, json=body)
    assert answer.status_code == 400
    assert answer.get_json()["error"]["param"] == param
