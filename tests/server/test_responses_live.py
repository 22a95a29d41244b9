"""Responses against a real server: the openai SDK's streams and its WebSocket mode, and kill -9.

Oracles: the SDK (which raises on events that do not fit together), its models, ``LLM.chat``.
"""

import json
import urllib.request

import openai
import pytest
from openai.resources.responses import Responses
from openai.types import responses
from pydantic import TypeAdapter
from server_process import killed_server, running_server
from waiting import PATIENCE_S, until
from websockets.sync.client import connect

from oxillama_torch.sampling.params import SamplingParams

# Older versions of the SDK have no WebSockets: their events are those of streams, and what is
# wrong with a message is told in an event that they do not know.
EVENT = TypeAdapter(getattr(responses, "ResponsesServerEvent", responses.ResponseStreamEvent))
KNOWS_REFUSALS = int(openai.__version__.partition(".")[0]) >= 3
QUESTION = "What does `textwrap.dedent` do?"
LONG = {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}}
TERMINAL = ("response.completed", "response.incomplete", "response.failed", "error")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server("--store", tmp_path_factory.mktemp("store") / "s.db") as url:
        yield url


@pytest.fixture
def sdk(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def model(sdk):
    return sdk.models.list().data[0].id


@pytest.fixture
def expected(llm):
    messages = [{"role": "user", "content": QUESTION}]
    return llm.chat(messages, SamplingParams(temperature=0, max_tokens=200)).text


@pytest.fixture
def socket(server):
    address = server.replace("http://", "ws://")
    with connect(f"{address}/v1/responses") as socket:
        yield socket


def running(server):
    with urllib.request.urlopen(f"{server}/stats", timeout=PATIENCE_S) as response:
        return json.load(response)["running"]


def test_sdk_streams_and_stores(sdk, model, expected):
    with sdk.responses.stream(model=model, input=QUESTION, temperature=0) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == expected
    assert sdk.responses.retrieve(final.id).output_text == expected


def test_sdk_resumes_a_background_stream(sdk, model):
    stream = sdk.responses.create(
        model=model, input=QUESTION, background=True, stream=True, max_output_tokens=40,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    first = []
    for event in stream:
        first.append(event)
        if len(first) == 6:
            break
    stream.close()
    rest = list(
        sdk.responses.retrieve(
            first[0].response.id, stream=True, starting_after=first[-1].sequence_number
        )
    )
    numbers = [event.sequence_number for event in first + rest]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.incomplete"
    assert rest[-1].response.usage.output_tokens == 40


def test_client_that_leaves_ends_its_response(server, sdk, model):
    stream = sdk.responses.create(model=model, input=QUESTION, stream=True, **LONG)
    response_id = next(iter(stream)).response.id
    until(lambda: running(server) == 1)
    stream.close()
    until(lambda: running(server) == 0)
    until(lambda: response_id in {r.id for r in sdk.get("/responses", cast_to=object_list).data})
    assert sdk.responses.retrieve(response_id).status == "cancelled"


object_list = openai.types.responses.ResponseItemList


def test_conversation_goes_on_over_turns(sdk, model, llm):
    conversation = sdk.conversations.create(metadata={"a": "b"})
    first = sdk.responses.create(
        model=model, input=QUESTION, temperature=0, conversation=conversation.id
    )
    second = sdk.responses.create(
        model=model, input="And now?", temperature=0, conversation=conversation.id,
        max_output_tokens=20,
    )  # fmt: skip
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And now?"},
    ]
    truth = llm.chat(messages, SamplingParams(temperature=0, max_tokens=20))
    assert second.output_text == truth.text
    items = list(sdk.conversations.items.list(conversation.id, order="asc", limit=1))
    assert [item.role for item in items] == ["user", "assistant"] * 2


@pytest.mark.skipif(
    not hasattr(Responses, "connect"),
    reason="this version of the SDK has no WebSockets",
)
@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")
def test_sdk_speaks_over_a_websocket(sdk, model, expected):
    with sdk.responses.connect() as connection:
        previous = None
        for _ in range(2):
            connection.response.create(
                model=model, input=QUESTION, temperature=0, store=False,
                **({"previous_response_id": previous} if previous else {}),
            )  # fmt: skip
            text = ""
            for event in connection:
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type in TERMINAL:
                    break
            assert event.type == "response.completed", event
            assert text == event.response.output_text
            if previous is None:
                assert text == expected
            # It is in the memory of the connection only.
            with pytest.raises(openai.NotFoundError):
                sdk.responses.retrieve(event.response.id)
            previous = event.response.id


def ask(socket, **fields):
    socket.send(json.dumps({"type": "response.create", "input": QUESTION, **fields}))


def receive(socket, endings=1):
    """Checked messages up to the last of so many responses."""
    events = []
    while sum(event["type"] in TERMINAL for event in events) < endings:
        events.append(json.loads(socket.recv(timeout=PATIENCE_S)))
        if "status" in events[-1] and not KNOWS_REFUSALS:
            assert events[-1].keys() <= {"type", "status", "error", "stream_id"}
            assert events[-1]["error"].keys() == {"code", "message", "param", "type"}
        else:
            EVENT.validate_python(events[-1], strict=True)
    return events


def test_lanes_go_on_side_by_side_and_each_in_turn(socket, model):
    for lane in ("a", "b", "a", "b", "a"):
        ask(socket, model=model, stream_id=lane, max_output_tokens=30, ignore_eos=True)
    events = receive(socket, endings=5)
    for lane, count in (("a", 3), ("b", 2)):
        mine = [event for event in events if event["stream_id"] == lane]
        starts = [e["response"]["id"] for e in mine if e["type"] == "response.created"]
        ends = [e["response"]["id"] for e in mine if e["type"] in TERMINAL]
        assert starts == ends
        assert len(starts) == count
        numbers = [e["sequence_number"] for e in mine]
        assert sum(number == 0 for number in numbers) == count


def test_prompt_can_be_read_ahead(socket, model, expected):
    ask(socket, model=model, generate=False)
    last = receive(socket)[-1]
    assert last["type"] == "response.completed"
    assert last["response"]["output"] == []
    text = "And what else?"
    ask(socket, model=model, input=text, previous_response_id=last["response"]["id"],
        max_output_tokens=5)  # fmt: skip
    assert receive(socket)[-1]["type"] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    ("message", "status", "code", "param"),
    [
        ("{", 400, "invalid_json", None),
        ("[]", 400, "invalid_type", None),
        ('{"type": "hello"}', 400, "invalid_value", "type"),
        ('{"type": "response.create", "input": "x"}', 400, "missing_required_parameter", "model"),
        ('{"type": "response.create", "model": "nope", "input": "x"}', 404, "model_not_found",
         "model"),
        ('{"type": "response.create", "model": "MODEL", "input": "x", "background": true}', 400,
         "unsupported_parameter", "background"),
        ('{"type": "response.create", "model": "MODEL", "input": "x", '
         '"previous_response_id": "resp_none"}', 400, "previous_response_not_found",
         "previous_response_id"),
        ('{"type": "response.create", "stream_id": 5}', 400, "invalid_value", "stream_id"),
    ],
)  # fmt: skip
def test_bad_message_is_answered_and_the_connection_stays(
    socket, model, message, status, code, param
):
    socket.send(message.replace("MODEL", model))
    (event,) = receive(socket)
    assert event["status"] == status
    error = event["error"]
    if code != "invalid_json":
        assert (error["code"], error["param"]) == (code, param)
    ask(socket, model=model, max_output_tokens=3)
    assert receive(socket)[-1]["type"] == "response.incomplete"


def test_steering_is_refused(socket):
    steer = {"type": "message", "role": "user", "content": "Stop."}
    message = {"type": "response.steer", "previous_response_id": "resp_1", "input": [steer]}
    socket.send(json.dumps(message))
    event = json.loads(socket.recv(timeout=PATIENCE_S))
    assert event["type"] == "response.steer.failed"
    assert event["error"]["code"] == "steering_not_supported"


def test_closed_connection_ends_its_responses(server, model):
    address = server.replace("http://", "ws://")
    with connect(f"{address}/v1/responses") as socket:
        for lane in ("a", "a", "b"):
            ask(socket, model=model, stream_id=lane, max_output_tokens=900, ignore_eos=True)
        until(lambda: running(server) == 2)
    until(lambda: running(server) == 0)


def test_background_responses_survive_kill_9(tmp_path):
    store = tmp_path / "s.db"
    cut_short = {**LONG, "max_output_tokens": 150}
    with (
        killed_server("--store", store) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk,
    ):
        model = sdk.models.list().data[0].id
        done = sdk.responses.create(model=model, input=QUESTION, max_output_tokens=20)
        cut = [
            sdk.responses.create(model=model, input=QUESTION, background=True, **cut_short)
            for _ in range(2)
        ]
    with (
        running_server("--store", store) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk,
    ):
        assert sdk.responses.retrieve(done.id) == done
        for response in cut:
            until(lambda r=response: sdk.responses.retrieve(r.id).status == "incomplete")
            assert sdk.responses.retrieve(response.id).usage.output_tokens == 150
