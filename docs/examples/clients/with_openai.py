"""A tool loop with the openai SDK, streaming and not.

pip install openai
scripts/serve &
python docs/examples/clients/with_openai.py
"""

from __future__ import annotations

import json

from openai import OpenAI
from weather_and_time import BASE_URL, MODEL, QUESTIONS, called, get_time, get_weather

FUNCTIONS = {"get_weather": get_weather, "get_time": get_time}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": function.__doc__,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
    for name, function in FUNCTIONS.items()
]


def ask(client: OpenAI, messages: list, stream: bool):
    fields = {"model": MODEL, "messages": messages, "tools": TOOLS}
    fields |= {"temperature": 0, "max_tokens": 100}
    if not stream:
        return client.chat.completions.create(**fields).choices[0].message
    with client.chat.completions.stream(**fields) as events:
        for event in events:
            if event.type == "tool_calls.function.arguments.delta":
                print(event.arguments_delta, end="|", flush=True)
        print()
        return events.get_final_completion().choices[0].message


def main() -> None:
    client = OpenAI(base_url=BASE_URL, api_key="none")
    for stream in (False, True):
        called.clear()
        messages: list = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            while (message := ask(client, messages, stream)).tool_calls:
                messages.append(message)
                for call in message.tool_calls:
                    result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            messages.append(message)
            print(question, "->", message.content)
        assert called == ["get_weather", "get_time"], called


if __name__ == "__main__":
    main()
