"""A client that calls tools until it has its answer, over real sockets. Oracle: the openai SDK."""

import json
import threading

import jsonschema
import openai
import pytest
from werkzeug.serving import make_server

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.app import close_app, create_app

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": CITY},
    }
    for name, description in (
        ("get_weather", "Get the current weather of a city."),
        ("get_time", "Get the local time of a city."),
    )
]
# Results as those that the demo model was trained on.
RESULTS = {
    "get_weather": {"city": "Oslo", "temperature": 7, "sky": "rainy"},
    "get_time": {"city": "Oslo", "time": "9:30"},
}


@pytest.fixture(scope="module")
def served(llm):
    """An app on a port of its own, and an SDK client for it."""
    app = create_app(ServerConfig(), llm)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client
    server.shutdown()
    thread.join()
    server.server_close()
    close_app(app)


def _ask(client, messages, *, stream):
    fields = {"model": client.models.list().data[0].id, "messages": messages, "tools": TOOLS}
    fields |= {"temperature": 0, "max_tokens": 80}
    if not stream:
        return client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as events:
        for _ in events:
            pass
        return events.get_final_completion().choices[0]


@pytest.mark.parametrize("stream", [False, True])
def test_two_tools_are_called_in_turn(served, stream):
    messages, called = [], []
    for question in ("What is the weather in Oslo?", "What time is it in Oslo?"):
        messages.append({"role": "user", "content": question})
        for _ in range(4):
            choice = _ask(served, messages, stream=stream)
            messages.append(choice.message.model_dump(include={"role", "content", "tool_calls"}))
            if not choice.message.tool_calls:
                break
            assert choice.finish_reason == "tool_calls"
            for call in choice.message.tool_calls:
                jsonschema.validate(json.loads(call.function.arguments), CITY)
                called.append(call.function.name)
                result = json.dumps(RESULTS[call.function.name])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        assert choice.finish_reason == "stop"
        assert choice.message.content
    assert called == ["get_weather", "get_time"]
