"""What one key has made, another can neither see nor touch. Oracle: the owner's own view."""

import io
import time

import openai
import orjson
import pytest
from server_process import running_server
from websockets.sync.client import connect

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.app import close_app, create_app

KEYS = ("anna", "bert")
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}


class Caller:
    """A client of one key."""

    def __init__(self, app, key):
        self._client = app.test_client()
        self._headers = {"Authorization": f"Bearer {key}"}

    def __call__(self, method, path, **arguments):
        # Buffered: bodies are read to their ends, so that files are closed.
        head = self._headers
        return self._client.open(path, method=method, headers=head, buffered=True, **arguments)

    def made(self, path, **arguments):
        response = self("POST", path, **arguments)
        assert response.status_code in (200, 202), response.get_json()
        return response.get_json()


@pytest.fixture
def app(make_app, store_settings):
    return make_app(api_keys=KEYS, **store_settings)


def upload(caller, content, purpose="batch"):
    data = {"file": (io.BytesIO(content), "in.jsonl"), "purpose": purpose}
    return caller.made("/v1/files", data=data)["id"]


def batch_input(model):
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return orjson.dumps(line) + b"\n"


def wait_for(read, done):
    deadline = time.monotonic() + 120
    while not done(found := read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def ended_batch(caller, model, **more):
    file = upload(caller, batch_input(model))
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = caller.made("/v1/batches", json={**body, **more})
    path = f"/v1/batches/{batch['id']}"
    ended = ("completed", "failed", "cancelled", "expired")
    return wait_for(lambda: caller("GET", path).get_json(), lambda b: b["status"] in ended)


def everything(caller, model):
    """One object of each kind that can be kept. Returns: (lists, paths of objects, changes)."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    completion = caller.made("/v1/chat/completions", json={**chat, "store": True})["id"]
    respond = {"model": model, "input": "Hi", "max_output_tokens": 1}
    response = caller.made("/v1/responses", json=respond)["id"]
    behind = caller.made("/v1/responses", json={**respond, "background": True})["id"]
    conversation = caller.made("/v1/conversations", json={"items": [ITEM]})["id"]
    items = f"/v1/conversations/{conversation}/items"
    item = caller("GET", items).get_json()["data"][0]["id"]
    assistant = caller.made("/v1/assistants", json={"model": model})["id"]
    thread = caller.made("/v1/threads", json={})["id"]
    messages = f"/v1/threads/{thread}/messages"
    message = caller.made(messages, json={"role": "user", "content": "Hi"})["id"]
    runs = f"/v1/threads/{thread}/runs"
    ask = {"assistant_id": assistant, "max_completion_tokens": 1}
    run = caller.made(runs, json=ask)["id"]
    over = ("completed", "incomplete", "failed")
    wait_for(lambda: caller("GET", f"{runs}/{run}").get_json(), lambda r: r["status"] in over)
    wait_for(
        lambda: caller("GET", f"/v1/responses/{behind}").get_json(),
        lambda r: r["status"] not in ("queued", "in_progress"),
    )
    step = caller("GET", f"{runs}/{run}/steps").get_json()["data"][0]["id"]
    batch = ended_batch(caller, model)
    lists = ["/v1/chat/completions", "/v1/responses", "/v1/assistants", "/v1/files",
             "/v1/batches", "/v1/batch_jobs"]  # fmt: skip
    paths = [
        f"/v1/chat/completions/{completion}",
        f"/v1/chat/completions/{completion}/messages",
        f"/v1/responses/{response}",
        f"/v1/responses/{response}/input_items",
        f"/v1/responses/{behind}",
        f"/v1/responses/{behind}?stream=true",
        f"/v1/conversations/{conversation}",
        items,
        f"{items}/{item}",
        f"/v1/assistants/{assistant}",
        f"/v1/threads/{thread}",
        messages,
        f"{messages}/{message}",
        runs,
        f"{runs}/{run}",
        f"{runs}/{run}/steps",
        f"{runs}/{run}/steps/{step}",
        f"/v1/batches/{batch['id']}",
        f"/v1/batch_jobs/{batch['id']}",
        f"/v1/batch_jobs/{batch['id']}/output",
        *(
            f"/v1/files/{file}{tail}"
            for file in (batch["input_file_id"], batch["output_file_id"])
            for tail in ("", "/content")
        ),
    ]
    metadata = {"json": {"metadata": {"mine": "now"}}}
    changes = [
        *(
            ("POST", path, metadata)
            for path in (
                f"/v1/chat/completions/{completion}",
                f"/v1/conversations/{conversation}",
                f"/v1/assistants/{assistant}",
                f"/v1/threads/{thread}",
                f"{messages}/{message}",
                f"{runs}/{run}",
            )
        ),
        ("POST", items, {"json": {"items": [ITEM]}}),
        ("POST", messages, {"json": {"role": "user", "content": "Mine"}}),
        ("POST", runs, {"json": ask}),
        ("POST", f"{runs}/{run}/cancel", {}),
        ("POST", f"{runs}/{run}/submit_tool_outputs", {"json": {"tool_outputs": []}}),
        ("POST", f"/v1/responses/{behind}/cancel", {}),
        ("POST", f"/v1/batches/{batch['id']}/cancel", {}),
        ("POST", f"/v1/batch_jobs/{batch['id']}/cancel", {}),
        *(
            ("DELETE", path, {})
            for path in (
                f"/v1/chat/completions/{completion}",
                f"/v1/responses/{response}",
                f"/v1/responses/{behind}",
                f"{items}/{item}",
                f"/v1/conversations/{conversation}",
                f"/v1/assistants/{assistant}",
                f"{messages}/{message}",
                f"/v1/threads/{thread}",
                f"/v1/files/{batch['output_file_id']}",
            )
        ),
    ]
    return lists, paths, changes


def test_what_a_key_has_made_is_there_for_it_alone(app, model_id):
    anna, bert = (Caller(app, key) for key in KEYS)
    lists, paths, changes = everything(anna, model_id)
    seen = {path: anna("GET", path) for path in [*lists, *paths]}
    for path, response in seen.items():
        assert response.status_code == 200, (path, response.get_data())
    for path in lists:
        assert seen[path].get_json()["data"], path
        assert bert("GET", path).get_json()["data"] == [], path
    for path in paths:
        assert bert("GET", path).status_code == 404, path
    for method, path, body in changes:
        assert bert(method, path, **body).status_code == 404, (method, path)
    for path in [*lists, *paths]:
        assert anna("GET", path).get_data() == seen[path].get_data(), path


def test_nothing_is_built_upon_what_another_key_has_made(app, model_id):
    anna, bert = (Caller(app, key) for key in KEYS)
    respond = {"model": model_id, "input": "Hi", "max_output_tokens": 1}
    response = anna.made("/v1/responses", json=respond)
    conversation = anna.made("/v1/conversations", json={"items": [ITEM]})["id"]
    file = upload(anna, batch_input(model_id))
    assistant = anna.made("/v1/assistants", json={"model": model_id})["id"]
    thread = bert.made("/v1/threads", json={})["id"]
    reference = [{"type": "item_reference", "id": response["output"][0]["id"]}]
    batch = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for path, body, status in (
        ("/v1/responses", {**respond, "previous_response_id": response["id"]}, 400),
        ("/v1/responses", {**respond, "conversation": conversation}, 404),
        ("/v1/responses", {**respond, "input": reference}, 400),
        ("/v1/conversations", {"items": reference}, 400),
        ("/v1/batches", {**batch, "input_file_id": file}, 404),
        (f"/v1/threads/{thread}/runs", {"assistant_id": assistant}, 404),
        ("/v1/threads/runs", {"assistant_id": assistant}, 404),
    ):
        refused = bert("POST", path, json=body)
        assert refused.status_code in (status, 404), (path, refused.get_json())
    # The owner can do all of it.
    for body in (
        {"previous_response_id": response["id"]},
        {"conversation": conversation},
        {"input": reference},
    ):
        anna.made("/v1/responses", json={**respond, **body})


def test_what_streams_and_lines_of_batches_store_is_their_owners(app, model_id):
    anna, bert = (Caller(app, key) for key in KEYS)
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": model_id, "messages": messages, "max_tokens": 1, "store": True}
    for path, streamed in (
        ("/v1/chat/completions", {**body, "stream": True}),
        ("/v1/responses", {"model": model_id, "input": "Hi", "stream": True}),
    ):
        assert b"data:" in anna("POST", path, json=streamed).get_data()
        assert len(anna("GET", path).get_json()["data"]) == 1
        assert bert("GET", path).get_json()["data"] == []
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = upload(bert, orjson.dumps(line))
    wanted = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = bert.made("/v1/batches", json={**wanted, "input_file_id": file})["id"]
    wait_for(
        lambda: bert("GET", f"/v1/batches/{batch}").get_json(),
        lambda found: found["status"] == "completed",
    )
    assert len(bert("GET", "/v1/chat/completions").get_json()["data"]) == 1
    assert len(anna("GET", "/v1/chat/completions").get_json()["data"]) == 1


def test_keys_of_one_owner_share_their_objects(make_app, tmp_path):
    path = tmp_path / "keys"
    path.write_text("old owner=team\nnew requests=100 owner=team\nother\n")
    app = make_app(api_key_file=path)
    old, new, other = (Caller(app, key) for key in ("old", "new", "other"))
    thread = old.made("/v1/threads", json={})["id"]
    assert new("GET", f"/v1/threads/{thread}").status_code == 200
    assert other("GET", f"/v1/threads/{thread}").status_code == 404


def test_a_key_named_like_another_owner_is_not_that_owner(make_app, tmp_path):
    path = tmp_path / "keys"
    path.write_text("anna\n")
    app = make_app(api_key_file=path)
    anna = Caller(app, "anna")
    thread = anna.made("/v1/threads", json={})["id"]
    holder = app.extensions["access"]._keys.find("anna").id
    path.write_text(f"anna\nthief owner={holder}\n")
    wait_for(lambda: Caller(app, "thief")("GET", "/v1/models").status_code, lambda s: s == 200)
    assert Caller(app, "thief")("GET", f"/v1/threads/{thread}").status_code == 404


def test_owners_are_known_after_a_restart_and_the_open_server_sees_none_of_it(llm, tmp_path):
    store = str(tmp_path / "store.db")
    paths = []
    for keys, expected in ((KEYS, 200), (KEYS, 200), ((), 404)):
        app = create_app(ServerConfig(api_keys=keys, store=store), llm)
        try:
            anna = Caller(app, "anna")
            if not paths:
                paths += [f"/v1/threads/{anna.made('/v1/threads', json={})['id']}"]
                paths += [f"/v1/files/{upload(anna, b'{}')}/content"]
            assert [anna("GET", path).status_code for path in paths] == [expected] * 2
            if keys:
                assert [Caller(app, "bert")("GET", p).status_code for p in paths] == [404] * 2
        finally:
            close_app(app)


def test_a_response_that_a_crash_has_cut_goes_on_for_its_owner(llm, tmp_path, model_id):
    """The queued row is what a killed process leaves."""
    settings = {"api_keys": KEYS, "store": str(tmp_path / "store.db")}
    app = create_app(ServerConfig(**settings), llm)
    try:
        anna = Caller(app, "anna")
        body = {"model": model_id, "input": "Hi", "background": True, "max_output_tokens": 2}
        first = anna.made("/v1/responses", json=body)["id"]
        path = f"/v1/responses/{first}"
        done = ("completed", "incomplete")
        wait_for(lambda: anna("GET", path).get_json(), lambda r: r["status"] in done)
        set_back(app, first)
    finally:
        close_app(app)
    app = create_app(ServerConfig(**settings), llm)
    try:
        anna, bert = (Caller(app, key) for key in KEYS)
        again = wait_for(lambda: anna("GET", path).get_json(), lambda r: r["status"] in done)
        assert again["output"]
        assert bert("GET", path).status_code == 404
        reference = [{"type": "item_reference", "id": again["output"][0]["id"]}]
        assert bert("POST", "/v1/conversations", json={"items": reference}).status_code >= 400
        anna.made("/v1/conversations", json={"items": reference})
    finally:
        close_app(app)


def set_back(app, response_id):
    """Have a stored response look as if it had not begun."""
    from oxillama_torch.server.store.owner import SERVER, acting_for
    from oxillama_torch.server.store.tables import ResponseRow

    def write(session):
        row = session.get(ResponseRow, response_id)
        row.status, row.events = "queued", None
        row.data = {**row.data, "status": "queued", "output": []}

    with acting_for(SERVER):
        app.extensions["store"].write(write)


def test_websockets_belong_to_the_key_that_opened_them(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("anna\nbert\n")
    with running_server("--api-key-file", keys) as url:
        sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="anna", max_retries=0)
        with sdk:
            model = sdk.models.list().data[0].id
            mine = sdk.responses.create(model=model, input="Hi", max_output_tokens=1)
        ask = {"type": "response.create", "model": model, "input": "Hi", "max_output_tokens": 1}
        ask["previous_response_id"] = mine.id
        for key, first in (("anna", "response.created"), ("bert", "error")):
            address = url.replace("http://", "ws://") + "/v1/responses"
            header = {"Authorization": f"Bearer {key}"}
            with connect(address, additional_headers=header) as socket:
                # What waits in a lane is begun by another thread than what comes first.
                other = {name: ask[name] for name in ask if name != "previous_response_id"}
                for message in (ask, {**other, "stream_id": "l"}, {**ask, "stream_id": "l"}):
                    socket.send(orjson.dumps(message).decode())
                begun = []
                while len(begun) < 3:
                    event = orjson.loads(socket.recv(timeout=120))
                    if event["type"] in ("response.created", "error"):
                        begun.append((event.get("stream_id"), event["type"]))
            assert [kind for lane, kind in begun if lane is None] == [first]
            assert [kind for lane, kind in begun if lane] == ["response.created", first]
