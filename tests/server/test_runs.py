"""Runs. Oracles: the openai SDK's models, pollers and event handler; chat completions."""

import json
import threading

import pytest
from openai import (
    AssistantEventHandler,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
)
from openai.types.beta import assistant_stream_event
from openai.types.beta.threads import Run
from pydantic import TypeAdapter
from sdk_over_app import sdk_over
from waiting import idle, until

from oxillama_torch.config import ServerConfig
from oxillama_torch.engine.outbox import Outbox, deliver
from oxillama_torch.engine.request import RequestHandle
from oxillama_torch.errors import CapacityError
from oxillama_torch.server.app import close_app, create_app
from oxillama_torch.server.assistants.records import recover_runs
from oxillama_torch.server.store.tables_assistants import RunRow

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")

EVENT = TypeAdapter(assistant_stream_event.AssistantStreamEvent)
TOOL = {
    "type": "function",
    "function": {
        "name": "choose",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = "What does `textwrap.dedent` do?"


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    return app.test_client()


def sdk_of(app):
    return sdk_over(app).beta


@pytest.fixture
def sdk(app):
    beta = sdk_of(app)
    yield beta
    beta._client.close()


@pytest.fixture
def model(client):
    return client.get("/v1/models").get_json()["data"][0]["id"]


@pytest.fixture
def assistant(sdk, model):
    return sdk.assistants.create(model=model, instructions="Be brief.", temperature=0)


@pytest.fixture
def thread(sdk):
    return sdk.threads.create(messages=[{"role": "user", "content": QUESTION}])


class Handler(AssistantEventHandler):
    """Checks every event and keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.names, self.text, self.calls, self.steps = [], "", [], []

    def on_event(self, event):
        EVENT.validate_python(event.to_dict(), strict=True)
        self.names.append(event.event)

    def on_text_delta(self, delta, snapshot):
        self.text += delta.value
        assert snapshot.value == self.text

    def on_run_step_done(self, run_step):
        self.steps.append(run_step)

    def on_tool_call_done(self, tool_call):
        self.calls.append(tool_call)


def strict(found):
    return type(found).model_validate(found.to_dict(), strict=True)


def short(names):
    """Event names without the deltas that repeat one."""
    return [name for i, name in enumerate(names) if not i or names[i - 1] != name]


def test_a_run_answers_as_chat_does(sdk, client, model, assistant, thread):
    run = sdk.threads.runs.create(thread.id, assistant_id=assistant.id)
    assert strict(run).status == "queued"
    done = sdk.threads.runs.poll(run.id, thread_id=thread.id, poll_interval_ms=20)
    assert strict(done).status == "completed"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    ]
    body = {"model": model, "messages": messages, "temperature": 0}
    chat = client.post("/v1/chat/completions", json=body).get_json()
    answer, question = sdk.threads.messages.list(thread.id).data
    assert answer.content[0].text.value == chat["choices"][0]["message"]["content"]
    assert (answer.run_id, answer.assistant_id) == (run.id, assistant.id)
    assert strict(answer).status == "completed" and question.role == "user"
    assert done.usage.total_tokens == chat["usage"]["total_tokens"]
    assert done.completed_at >= done.started_at >= done.created_at and done.expires_at is None
    [step] = sdk.threads.runs.steps.list(run.id, thread_id=thread.id)
    assert strict(step).step_details.message_creation.message_id == answer.id
    found = sdk.threads.runs.steps.retrieve(step.id, thread_id=thread.id, run_id=run.id)
    assert found.status == "completed"
    assert [r.id for r in sdk.threads.runs.list(thread.id)] == [run.id]
    assert [m.id for m in sdk.threads.messages.list(thread.id, run_id=run.id)] == [answer.id]


ONE_MESSAGE = [
    "thread.run.created",
    "thread.run.queued",
    "thread.run.in_progress",
    "thread.run.step.created",
    "thread.run.step.in_progress",
    "thread.message.created",
    "thread.message.in_progress",
    "thread.message.delta",
    "thread.message.completed",
    "thread.run.step.completed",
    "thread.run.completed",
]


def test_the_stream_has_every_event_in_order(sdk, assistant, thread):
    handler = Handler()
    with sdk.threads.runs.stream(
        thread_id=thread.id, assistant_id=assistant.id, event_handler=handler
    ) as stream:
        stream.until_done()
    assert short(handler.names) == ONE_MESSAGE
    run = handler.get_final_run()
    [message] = handler.get_final_messages()
    assert message.content[0].text.value == handler.text != ""
    # what was streamed is what is stored
    assert sdk.threads.runs.retrieve(run.id, thread_id=thread.id) == run
    assert sdk.threads.messages.retrieve(message.id, thread_id=thread.id) == message
    assert list(sdk.threads.runs.steps.list(run.id, thread_id=thread.id)) == handler.steps


def test_a_new_thread_and_its_run(sdk, client, assistant):
    handler = Handler()
    with sdk.threads.create_and_run_stream(
        assistant_id=assistant.id,
        thread={"messages": [{"role": "user", "content": QUESTION}]},
        event_handler=handler,
    ) as stream:
        stream.until_done()
    assert short(handler.names) == ["thread.created", *ONE_MESSAGE]
    body = {"assistant_id": assistant.id, "stream": True}
    raw = client.post("/v1/threads/runs", json=body).get_data(as_text=True)
    assert raw.startswith("event: thread.created\ndata: {")
    assert raw.endswith("event: done\ndata: [DONE]\n\n")


def test_the_thread_goes_on(sdk, client, model, assistant, thread):
    """The second run sees the first one's answer, and messages of its own."""
    sdk.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=20
    )
    first = sdk.threads.messages.list(thread.id).data[0].content[0].text.value
    run = sdk.threads.runs.create_and_poll(
        thread_id=thread.id,
        assistant_id=assistant.id,
        additional_instructions="And kind.",
        additional_messages=[{"role": "user", "content": "And `abs`?"}],
        poll_interval_ms=20,
    )
    messages = [
        {"role": "system", "content": "Be brief.\n\nAnd kind."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And `abs`?"},
    ]
    body = {"model": model, "messages": messages, "temperature": 0}
    chat = client.post("/v1/chat/completions", json=body).get_json()
    answer = sdk.threads.messages.list(thread.id).data[0]
    assert answer.content[0].text.value == chat["choices"][0]["message"]["content"]
    assert run.usage.prompt_tokens == chat["usage"]["prompt_tokens"]
    # of the last message alone
    run = sdk.threads.runs.create_and_poll(
        thread_id=thread.id,
        assistant_id=assistant.id,
        instructions="",
        additional_messages=[{"role": "user", "content": QUESTION}],
        truncation_strategy={"type": "last_messages", "last_messages": 1},
        poll_interval_ms=20,
    )
    body["messages"] = [{"role": "user", "content": QUESTION}]
    chat = client.post("/v1/chat/completions", json=body).get_json()
    assert run.usage.prompt_tokens == chat["usage"]["prompt_tokens"]


CALLING = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


def test_tools_are_called_and_answered(sdk, assistant, thread):
    handler = Handler()
    with sdk.threads.runs.stream(
        thread_id=thread.id, assistant_id=assistant.id, event_handler=handler, **CALLING
    ) as stream:
        stream.until_done()
    assert short(handler.names) == [
        "thread.run.created",
        "thread.run.queued",
        "thread.run.in_progress",
        "thread.run.step.created",
        "thread.run.step.in_progress",
        "thread.run.step.delta",
        "thread.run.requires_action",
    ]
    run = strict(handler.get_final_run())
    [call] = run.required_action.submit_tool_outputs.tool_calls
    assert call.function.name == "choose"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")
    [done] = handler.calls
    assert done.function.arguments == call.function.arguments and done.id == call.id
    with pytest.raises(BadRequestError, match="active"):
        sdk.threads.messages.create(thread.id, role="user", content="x")
    with pytest.raises(BadRequestError, match="active"):
        sdk.threads.runs.create(thread.id, assistant_id=assistant.id)
    again = Handler()
    with sdk.threads.runs.submit_tool_outputs_stream(
        thread_id=thread.id,
        run_id=run.id,
        tool_outputs=[{"tool_call_id": call.id, "output": "sunny"}],
        event_handler=again,
    ) as stream:
        stream.until_done()
    assert short(again.names) == ["thread.run.step.completed", *ONE_MESSAGE[1:]]
    final = again.get_final_run()
    assert final.id == run.id and final.status == "completed"
    steps = [strict(s) for s in sdk.threads.runs.steps.list(run.id, thread_id=thread.id)]
    assert [step.type for step in steps] == ["message_creation", "tool_calls"]
    assert sum(step.usage.total_tokens for step in steps) == final.usage.total_tokens
    [answered] = steps[1].step_details.tool_calls
    assert answered.function.output == "sunny" and steps[1].status == "completed"
    # every later run of the thread sees the call as chat would be given it
    text = sdk.threads.messages.list(thread.id).data[0].content[0].text.value
    third = sdk.threads.runs.create_and_poll(
        thread_id=thread.id,
        assistant_id=assistant.id,
        poll_interval_ms=20,
        tools=[TOOL],
        tool_choice="none",
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        {"role": "assistant", "content": text},
    ]
    body = {"model": assistant.model, "messages": messages, "temperature": 0, "tools": [TOOL]}
    body["tool_choice"] = "none"
    # a bare ``dict`` is more than version 2 of the SDK can make
    chat = sdk._client.post("/chat/completions", body=body, cast_to=dict[str, object])
    assert third.usage.prompt_tokens == chat["usage"]["prompt_tokens"]


def test_outputs_must_be_those_that_were_asked_for(sdk, assistant, thread):
    run = sdk.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=20, **CALLING
    )
    assert run.status == "requires_action"
    [call] = run.required_action.submit_tool_outputs.tool_calls
    right = {"tool_call_id": call.id, "output": "x"}
    for wrong in ([], [{"tool_call_id": "call_x", "output": ""}], [right, right]):
        with pytest.raises(BadRequestError) as error:
            sdk.threads.runs.submit_tool_outputs(run.id, thread_id=thread.id, tool_outputs=wrong)
        assert error.value.param == "tool_outputs"
    done = sdk.threads.runs.submit_tool_outputs_and_poll(
        run_id=run.id, thread_id=thread.id, tool_outputs=[right], poll_interval_ms=20
    )
    assert done.status == "completed"
    with pytest.raises(BadRequestError):
        sdk.threads.runs.submit_tool_outputs(run.id, thread_id=thread.id, tool_outputs=[right])


def test_a_limit_of_tokens_makes_it_incomplete(sdk, assistant, thread):
    handler = Handler()
    with sdk.threads.runs.stream(
        thread_id=thread.id,
        assistant_id=assistant.id,
        max_completion_tokens=2,
        event_handler=handler,
    ) as stream:
        stream.until_done()
    assert handler.names[-3:] == [
        "thread.message.incomplete",
        "thread.run.step.completed",
        "thread.run.incomplete",
    ]
    run = strict(handler.get_final_run())
    assert run.incomplete_details.reason == "max_completion_tokens"
    assert run.usage.completion_tokens == 2
    [message] = handler.get_final_messages()
    assert strict(message).incomplete_details.reason == "max_tokens"


def test_a_thread_too_long_for_the_runs_limit(sdk, assistant, thread):
    run = sdk.threads.runs.create(thread.id, assistant_id=assistant.id, max_prompt_tokens=1)
    run = sdk.threads.runs.retrieve(run.id, thread_id=thread.id)
    assert run.status == "incomplete" and run.incomplete_details.reason == "max_prompt_tokens"


def test_a_thread_too_long_for_the_model_loses_its_oldest_messages(sdk, llm, assistant):
    long = "word " * (llm.engine.max_context // 8)
    thread = sdk.threads.create(messages=[{"role": "user", "content": long}] * 30)
    run = sdk.threads.runs.create_and_poll(
        thread_id=thread.id,
        assistant_id=assistant.id,
        max_completion_tokens=1,
        poll_interval_ms=20,
    )
    assert run.status in ("incomplete", "completed")
    assert run.usage.prompt_tokens < llm.engine.max_context
    thread = sdk.threads.create(messages=[{"role": "user", "content": long * 20}])
    with pytest.raises(BadRequestError) as error:
        sdk.threads.runs.create(thread.id, assistant_id=assistant.id)
    assert error.value.code == "context_length_exceeded"


class Held:
    """Lets a generation begin but not end: it is told nothing until it is let go."""

    def __init__(self, monkeypatch, engine):
        self.gate, self.handles = threading.Event(), []
        submit = engine.submit

        def hold(request, outbox=None):
            kept = Outbox()
            handle = RequestHandle(submit(request, kept).request, engine.cancel, outbox)

            def pass_on(_):
                if self.gate.is_set():
                    deliver([(handle, event) for _, event in kept.take()])

            kept.notify(pass_on, None)
            self.handles.append(handle)
            return handle

        monkeypatch.setattr(engine, "submit", hold)


def running(sdk, thread, assistant, **fields):
    return sdk.threads.runs.create(thread.id, assistant_id=assistant.id, **fields)


def test_cancel_stops_the_generation(sdk, llm, assistant, thread):
    run = running(
        sdk, thread, assistant, instructions="x " * 50, temperature=2, max_completion_tokens=4000
    )
    ended = strict(sdk.threads.runs.cancel(run.id, thread_id=thread.id))
    assert ended.status == "cancelling"
    done = strict(sdk.threads.runs.poll(run.id, thread_id=thread.id, poll_interval_ms=20))
    if done.status == "completed":
        pytest.skip("the model came to its end before it could be cancelled")
    assert done.status == "cancelled" and done.cancelled_at
    assert done.usage.completion_tokens < 4000
    until(lambda: idle(llm.engine), "the run is still computed")
    for message in sdk.threads.messages.list(thread.id, run_id=run.id):
        assert strict(message).incomplete_details.reason == "run_cancelled"
    for step in sdk.threads.runs.steps.list(run.id, thread_id=thread.id):
        assert strict(step).status == "cancelled"
    with pytest.raises(BadRequestError):
        sdk.threads.runs.cancel(run.id, thread_id=thread.id)
    sdk.threads.messages.create(thread.id, role="user", content="free again")


def test_cancel_while_the_client_is_asked(sdk, assistant, thread):
    run = sdk.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=20, **CALLING
    )
    sdk.threads.runs.cancel(run.id, thread_id=thread.id)
    done = strict(sdk.threads.runs.retrieve(run.id, thread_id=thread.id))
    assert done.status == "cancelled" and done.required_action is None
    [step] = sdk.threads.runs.steps.list(run.id, thread_id=thread.id)
    assert strict(step).status == "cancelled"
    # a call that was never answered is no part of what later runs see
    later = sdk.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=20
    )
    assert later.status == "completed"


def test_tool_outputs_that_do_not_come(app, sdk, assistant, thread):
    run = sdk.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=20, **CALLING
    )
    assert run.expires_at == run.created_at + 600

    def age(session):
        session.get(RunRow, run.id).expires_at = 1

    app.extensions["store"].write(age)
    assert strict(sdk.threads.runs.retrieve(run.id, thread_id=thread.id)).status == "expired"
    [step] = sdk.threads.runs.steps.list(run.id, thread_id=thread.id)
    assert strict(step).status == "expired" and step.expired_at
    outputs = [{"tool_call_id": "x", "output": ""}]
    with pytest.raises(BadRequestError):
        sdk.threads.runs.submit_tool_outputs(run.id, thread_id=thread.id, tool_outputs=outputs)


def test_a_run_without_room_for_its_stream_leaves_the_thread_free(make_app, model):
    app = make_app(max_streams=1)
    sdk = sdk_of(app)
    made = sdk.assistants.create(model=model, temperature=0)
    thread = sdk.threads.create(messages=[{"role": "user", "content": QUESTION}])
    with app.extensions["lifecycle"].running(lambda error: None):
        with pytest.raises(InternalServerError) as error:
            sdk.threads.runs.create(thread.id, assistant_id=made.id, stream=True)
        assert error.value.code == "overloaded"
    [run] = sdk.threads.runs.list(thread.id)
    done = sdk.threads.runs.poll(run.id, thread_id=thread.id, poll_interval_ms=20)
    assert done.status in ("cancelled", "completed")
    sdk._client.close()


def test_a_full_engine_refuses_the_run(sdk, llm, assistant, thread, monkeypatch):
    def full(request, outbox=None):
        raise CapacityError("full", retry_after_s=1)

    monkeypatch.setattr(llm.engine, "submit", full)
    with pytest.raises(RateLimitError):
        sdk.threads.runs.create(thread.id, assistant_id=assistant.id)
    monkeypatch.undo()
    assert list(sdk.threads.runs.list(thread.id)) == []


def test_an_engine_that_fails_fails_the_run(sdk, llm, assistant, thread, monkeypatch):
    held = Held(monkeypatch, llm.engine)
    run = running(sdk, thread, assistant)
    job = sdk._client._client._transport.app.__self__.extensions["runs"].find(run.id)
    job.abort(RuntimeError("secret"))
    held.gate.set()
    done = sdk.threads.runs.poll(run.id, thread_id=thread.id, poll_interval_ms=20)
    assert strict(done).status == "failed" and done.failed_at
    assert (done.last_error.code, done.last_error.message) == ("server_error", "internal error")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"assistant_id": None}, "assistant_id"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"truncation_strategy": {"type": "last_messages"}}, "truncation_strategy.last_messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_bad_field_is_named(client, assistant, thread, fields, param):
    body = {"assistant_id": assistant.id, **fields}
    response = client.post(f"/v1/threads/{thread.id}/runs", json=body)
    assert response.status_code == 400, response.get_json()
    assert response.get_json()["error"]["param"] == param
    assert client.get(f"/v1/threads/{thread.id}/runs").get_json()["data"] == []


def test_what_is_not_there(sdk, assistant, thread):
    for call in (
        lambda: sdk.threads.runs.create("thread_x", assistant_id=assistant.id),
        lambda: sdk.threads.runs.create(thread.id, assistant_id="asst_x"),
        lambda: sdk.threads.runs.create(thread.id, assistant_id=assistant.id, model="other"),
        lambda: sdk.threads.runs.retrieve("run_x", thread_id=thread.id),
        lambda: sdk.threads.runs.cancel("run_x", thread_id=thread.id),
        lambda: sdk.threads.runs.steps.list("run_x", thread_id=thread.id),
    ):
        with pytest.raises(NotFoundError):
            call()


def test_oxillamas_runs_have_a_model_and_no_assistant(client, model, thread):
    body = {"model": model, "instructions": "Be brief.", "max_tokens": 3}
    run = client.post(f"/v1/threads/{thread.id}/runs", json=body).get_json()
    assert Run.model_validate(run, strict=True).max_completion_tokens == 3


def test_metadata_of_a_run(sdk, assistant, thread):
    run = running(sdk, thread, assistant, metadata={"a": "b"})
    sdk.threads.runs.update(run.id, thread_id=thread.id, metadata={"c": "d"})
    done = sdk.threads.runs.poll(run.id, thread_id=thread.id, poll_interval_ms=20)
    assert done.metadata == {"c": "d"}


def test_a_thread_deleted_under_its_run(sdk, assistant, thread):
    run = running(sdk, thread, assistant)
    sdk.threads.delete(thread.id)
    with pytest.raises(NotFoundError):
        sdk.threads.runs.retrieve(run.id, thread_id=thread.id)


def test_after_a_crash_no_run_hangs(llm, model, store_settings, monkeypatch):
    """Runs at work have failed; one that waits for its client waits on."""
    settings = ServerConfig(**store_settings)
    app = create_app(settings, llm)
    sdk = sdk_of(app)
    made = sdk.assistants.create(model=model, temperature=0)
    threads = [sdk.threads.create(messages=[{"role": "user", "content": "x"}]) for _ in range(2)]
    asked = sdk.threads.runs.create_and_poll(
        thread_id=threads[0].id, assistant_id=made.id, poll_interval_ms=20, **CALLING
    )
    Held(monkeypatch, llm.engine)
    cut = running(sdk, threads[1], made)
    sdk._client.close()
    close_app(app)
    app = create_app(settings, llm)
    monkeypatch.undo()
    sdk = sdk_of(app)
    done = strict(sdk.threads.runs.retrieve(cut.id, thread_id=threads[1].id))
    assert done.status == "failed" and done.last_error.code == "server_error"
    sdk.threads.messages.create(threads[1].id, role="user", content="free again")
    [call] = asked.required_action.submit_tool_outputs.tool_calls
    done = sdk.threads.runs.submit_tool_outputs_and_poll(
        run_id=asked.id,
        thread_id=threads[0].id,
        tool_outputs=[{"tool_call_id": call.id, "output": "x"}],
        poll_interval_ms=20,
    )
    assert done.status == "completed"
    recover_runs(app.extensions["store"])
    sdk._client.close()
    close_app(app)
