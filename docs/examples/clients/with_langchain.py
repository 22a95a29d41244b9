"""A tool loop with langchain-openai, streaming and not, and an answer in a schema.

pip install langchain-openai
"""

from __future__ import annotations

from typing import Literal

from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from weather_and_time import BASE_URL, MODEL, QUESTIONS, called, get_time, get_weather

TOOLS = {function.__name__: tool(function) for function in (get_weather, get_time)}


class Verdict(BaseModel):
    """Which of the two it is."""

    kind: Literal["weather", "time"]


def ask(model, messages: list, stream: bool):
    if not stream:
        return model.invoke(messages)
    whole: AIMessageChunk | None = None
    for chunk in model.stream(messages):
        whole = chunk if whole is None else whole + chunk
    return whole


def main() -> None:
    chat = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key="none", temperature=0, max_tokens=100)
    model = chat.bind_tools(list(TOOLS.values()))
    for stream in (False, True):
        called.clear()
        messages: list = []
        for question in QUESTIONS:
            messages.append(HumanMessage(question))
            while (message := ask(model, messages, stream)).tool_calls:
                messages.append(message)
                messages += [TOOLS[call["name"]].invoke(call) for call in message.tool_calls]
            messages.append(message)
            print(question, "->", message.content)
        assert called == ["get_weather", "get_time"], called
    for method in ("json_schema", "function_calling"):
        verdict = chat.with_structured_output(Verdict, method=method).invoke(QUESTIONS[0])
        print(method, "->", verdict)
        assert isinstance(verdict, Verdict)


if __name__ == "__main__":
    main()
