"""``/v1/responses`` over both stores. Oracle: the openai SDK's models, validated strictly, and
``LLM.chat`` for the text."""

import json
import threading
import time

import openai
import pytest
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter
from waiting import PATIENCE_S, idle, until

from oxillama_torch.config import ServerConfig
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.app import close_app, create_app

EVENT = TypeAdapter(ResponseStreamEvent)
QUESTION = "What does `textwrap.dedent` do?"
GREEDY = {"temperature": 0, "max_output_tokens": 12}
TERMINAL = {"response.completed", "response.failed", "response.incomplete"}
TOOL = {
    "type": "function", "name": "decide", "description": "Decide.", "strict": True,
    "parameters": {"type": "object", "properties": {"yes": {"type": "boolean"}},
                   "required": ["yes"], "additionalProperties": False},
}  # fmt: skip


def both_stores(test):
    """Run a test on an empty store of each kind."""
    each = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
    return pytest.mark.usefixtures("settings")(each(test))


@pytest.fixture
def settings(request, new_store):
    return new_store(getattr(request, "param", "sqlite"))


@pytest.fixture(scope="module", autouse=True)
def shared_app(llm):
    """For tests that do not mind what others have stored."""
    app = create_app(ServerConfig(), llm)
    body = {"model": app.extensions["service"].model_id, "input": "x", "max_output_tokens": 1}
    # Its threads start here, and not within a test.
    assert app.test_client().post("/v1/responses", json=body).status_code == 200
    yield app
    close_app(app)


@pytest.fixture
def client(request, make_app):
    if "settings" in request.fixturenames:
        return make_app(**request.getfixturevalue("settings")).test_client()
    return request.getfixturevalue("shared_app").test_client()


@pytest.fixture
def ask(client, model_id):
    """Create a response; the SDK's object, unless an error is expected."""

    def ask(input=QUESTION, status=200, **fields):
        body = {"model": model_id, "input": input, **GREEDY, **fields}
        answer = client.post("/v1/responses", json=body)
        assert answer.status_code == status, answer.text
        if status != 200:
            return answer.get_json()["error"]
        if fields.get("stream"):
            return events_of(answer)
        return Response.model_validate(answer.get_json(), strict=True)

    return ask


@pytest.fixture
def get(client):
    def get(response_id):
        answer = client.get(f"/v1/responses/{response_id}")
        assert answer.status_code == 200, answer.text
        return Response.model_validate(answer.get_json(), strict=True)

    return get


def events_of(answer):
    """The events of a stream, checked by the SDK's models one by one."""
    events = []
    for frame in answer.get_data(as_text=True).split("\n\n"):
        if frame.startswith("event: "):
            name, data = frame.split("\n", 1)
            event = json.loads(data.removeprefix("data: "))
            assert event["type"] == name.removeprefix("event: ")
            EVENT.validate_python(event, strict=True)
            events.append(event)
    assert [e["type"] in TERMINAL for e in events] == [False] * (len(events) - 1) + [True]
    return events


def wait_for(get, response_id, *statuses):
    def reached():
        response = get(response_id)
        return response if response.status in statuses else None

    return until(reached, f"the response is not {' or '.join(statuses)}")


def test_text_is_that_of_the_library(ask, llm, get):
    response = ask(instructions="Answer in one sentence.")
    messages = [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": QUESTION},
    ]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))
    assert response.output_text == expected.text
    assert response.usage.input_tokens == len(expected.prompt_token_ids)
    assert response.usage.output_tokens == len(expected.token_ids)
    assert response.instructions == "Answer in one sentence."
    assert get(response.id) == response


def test_stream_makes_the_same_response(ask, get):
    whole = ask()
    events = ask(stream=True)
    state = ResponseStreamState(input_tools=[], text_format=openai.omit)
    for event in events:
        state.handle_event(EVENT.validate_python(event))
    last = Response.model_validate(events[-1]["response"], strict=True)
    assert last.output_text == whole.output_text
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert get(last.id) == last
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@both_stores
def test_turns_build_on_each_other(ask, llm):
    first = ask()
    second = ask("And `re.escape`?", previous_response_id=first.id, instructions="x")
    third = ask([{"role": "user", "content": "Why?"}], previous_response_id=second.id)
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And `re.escape`?"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "Why?"},
    ]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))
    assert third.output_text == expected.text
    assert third.usage.input_tokens == len(expected.prompt_token_ids)
    assert third.previous_response_id == second.id


def test_turn_builds_on_a_streamed_one(ask, llm):
    first = ask(stream=True)[-1]["response"]
    second = ask("And now?", previous_response_id=first["id"])
    text = first["output"][0]["content"][0]["text"]
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And now?"},
    ]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))
    assert second.output_text == expected.text


@both_stores
def test_items_of_the_past_can_be_sent_or_named(ask):
    first = ask()
    chained = ask("And now?", previous_response_id=first.id)
    question = {"role": "user", "content": QUESTION}
    new = {"role": "user", "content": "And now?"}
    sent = ask([question, first.output[0].model_dump(), new])
    named = ask([question, {"type": "item_reference", "id": first.output[0].id}, new])
    assert chained.output_text == sent.output_text == named.output_text
    assert chained.usage.input_tokens == sent.usage.input_tokens == named.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_stored_is_not_there(ask, client, stream):
    made = ask(store=False, stream=stream)
    response_id = made[-1]["response"]["id"] if stream else made.id
    assert client.get(f"/v1/responses/{response_id}").status_code == 404
    error = ask(previous_response_id=response_id, status=400)
    assert error["code"] == "previous_response_not_found"
    assert error["param"] == "previous_response_id"


def test_logprobs_are_those_of_the_library(ask, llm):
    response = ask(include=["message.output_text.logprobs"], top_logprobs=3)
    messages = [{"role": "user", "content": QUESTION}]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12, logprobs=3))
    entries = response.output[0].content[0].logprobs
    assert len(entries) == len(expected.token_ids)
    for entry, truth in zip(entries, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(truth.logprob, abs=1e-5)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(
            [logprob for _, logprob in truth.top], abs=1e-5
        )


def test_json_schema_is_kept(ask):
    format_ = {"type": "json_schema", "name": "answer", "strict": True,
               "schema": TOOL["parameters"]}  # fmt: skip
    response = ask(text={"format": format_}, max_output_tokens=100)
    assert set(json.loads(response.output_text)) == {"yes"}
    assert response.text.format.name == "answer"


def test_functions_are_called_and_answered(ask):
    events = ask(tools=[TOOL], tool_choice="required", max_output_tokens=100, stream=True)
    response = Response.model_validate(events[-1]["response"], strict=True)
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls
    assert set(json.loads(calls[0].arguments)) == {"yes"}
    assert response.tools[0].name == "decide"
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        for call in calls
    ]
    error = ask(previous_response_id=response.id, status=400)
    assert "No tool output found" in error["message"]
    after = ask(outputs, previous_response_id=response.id, tools=[TOOL], tool_choice="none")
    assert after.output[0].type == "message"


def test_background_response_is_finished_without_its_client(ask, get):
    response = ask(background=True)
    assert response.status == "queued"
    done = wait_for(get, response.id, "incomplete", "completed")
    assert done.background
    assert done.output_text == ask().output_text


@both_stores
def test_background_stream_can_be_read_again_from_anywhere(ask, client):
    events = ask(background=True, stream=True)
    assert [e["type"] for e in events[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip
    url = f"/v1/responses/{events[0]['response']['id']}"
    assert events_of(client.get(f"{url}?stream=true")) == events
    for after in (0, 4, len(events) - 2):
        assert (
            events_of(client.get(f"{url}?stream=true&starting_after={after}"))
            == (events[after + 1 :])
        )


def test_events_of_others_are_not_kept(ask, client):
    answer = client.get(f"/v1/responses/{ask().id}?stream=true")
    assert answer.status_code == 400


def long(**fields):
    return {"max_output_tokens": 400, "ignore_eos": True, **fields}


def test_live_stream_is_joined_and_cancelled(ask, get, client, llm):
    response = ask(background=True, **long())
    url = f"/v1/responses/{response.id}"
    reader = []
    thread = threading.Thread(
        target=lambda: reader.extend(events_of(client.application.test_client().get(
            f"{url}?stream=true&starting_after=1")))
    )  # fmt: skip
    thread.start()
    wait_for(get, response.id, "in_progress")
    cancelled = client.post(f"{url}/cancel")
    thread.join(timeout=PATIENCE_S)
    assert not thread.is_alive()
    assert Response.model_validate(cancelled.get_json(), strict=True).status == "cancelled"
    assert client.post(f"{url}/cancel").get_json() == cancelled.get_json()
    assert get(response.id).status == "cancelled"
    assert [event["sequence_number"] for event in reader] == list(range(2, len(reader) + 2))
    assert reader[-1]["response"]["status"] == "cancelled"
    until(lambda: idle(llm.engine), "the response is still computed")


def test_only_background_responses_are_cancelled(ask, client):
    answer = client.post(f"/v1/responses/{ask().id}/cancel")
    assert answer.status_code == 400


@both_stores
def test_deleted_response_is_gone(ask, client, llm):
    for made in (ask(), ask(background=True, **long())):
        answer = client.delete(f"/v1/responses/{made.id}")
        assert answer.get_json() == {"id": made.id, "object": "response", "deleted": True}
        assert client.get(f"/v1/responses/{made.id}").status_code == 404
        assert client.delete(f"/v1/responses/{made.id}").status_code == 404
        assert ask(previous_response_id=made.id, status=400)
    assert client.get("/v1/responses").get_json()["data"] == []


def test_input_items(ask, client):
    items = [{"role": "user", "content": f"{n}"} for n in range(5)]
    response = ask(items)
    url = f"/v1/responses/{response.id}/input_items"
    listed = ResponseItemList.model_validate(client.get(url).get_json(), strict=True)
    assert [item.content[0].text for item in listed.data] == ["4", "3", "2", "1", "0"]
    page = client.get(f"{url}?order=asc&limit=2&after={listed.data[3].id}").get_json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["2", "3"]
    assert page["has_more"]


@both_stores
def test_list_is_in_pages(ask, client):
    ids = [ask().id for _ in range(3)]
    page = client.get("/v1/responses?limit=2").get_json()
    assert [r["id"] for r in page["data"]] == ids[:0:-1]
    assert page["has_more"]
    page = client.get(f"/v1/responses?limit=2&after={page['last_id']}").get_json()
    assert ([r["id"] for r in page["data"]], page["has_more"]) == (ids[:1], False)


def test_input_tokens_are_those_that_are_used(ask, client, model_id):
    first = ask()
    body = {"model": model_id, "input": "And now?", "previous_response_id": first.id}
    counted = client.post("/v1/responses/input_tokens", json=body).get_json()
    if hasattr(openai.types.responses, "input_token_count_response"):  # of version 2 on
        kind = openai.types.responses.input_token_count_response.InputTokenCountResponse
        kind.model_validate(counted, strict=True)
    second = ask("And now?", previous_response_id=first.id)
    assert counted["input_tokens"] == second.usage.input_tokens


def test_old_turns_make_room_when_asked_to(ask, llm):
    context = llm.engine.max_context
    items = [
        {"role": role, "content": "word " * (context // 8)}
        for _ in range(6)
        for role in ("user", "assistant")
    ]
    items.append({"role": "user", "content": QUESTION})
    assert ask(items, status=400)["code"] == "context_length_exceeded"
    response = ask(items, truncation="auto")
    assert 0 < response.usage.input_tokens < context
    assert response.usage.input_tokens > context // 2


@both_stores
@pytest.mark.parametrize(
    "path",
    ["/v1/responses/resp_x", "/v1/responses/x%00y", "/v1/responses/x/input_items",
     "/v1/responses/%F0%9F%98%80?stream=true"],
)  # fmt: skip
def test_unknown_response_is_404(client, path):
    answer = client.get(path)
    assert (answer.status_code, answer.get_json()["error"]["code"]) == (404, "not_found")


def text_of(events):
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


@both_stores
def test_responses_survive_a_restart(llm, settings):
    """Also one that was not finished: it is begun again, and says the same again."""
    model_id = llm.name  # the fixture asks an application that has the store open
    app = create_app(ServerConfig(**settings), llm)
    client = app.test_client()
    body = {"model": model_id, "input": QUESTION, "max_output_tokens": 80, "ignore_eos": True}
    finished = client.post("/v1/responses", json=body).get_json()
    cut = client.post("/v1/responses", json={**body, "background": True}).get_json()
    job = app.extensions["responses"].find(cut["id"])
    while not (before := text_of(map(json.loads, job.log.take(0)))):
        time.sleep(0.01)
    close_app(app)
    app = create_app(ServerConfig(**settings), llm)
    client = app.test_client()
    assert client.get(f"/v1/responses/{finished['id']}").get_json() == finished

    def ended():
        response = client.get(f"/v1/responses/{cut['id']}").get_json()
        return None if response["status"] in ("queued", "in_progress") else response

    response = until(ended, "the response is not finished after the restart")
    events = events_of(client.get(f"/v1/responses/{cut['id']}?stream=true"))
    close_app(app)
    assert response["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 80
    assert text_of(events) == response["output"][0]["content"][0]["text"]
    assert text_of(events).startswith(before)
