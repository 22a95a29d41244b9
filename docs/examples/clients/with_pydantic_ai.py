"""An agent with two tools, by pydantic-ai, streamed and not, and one with a typed result.

pip install "pydantic-ai-slim[openai]"
"""

from __future__ import annotations

import asyncio
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from weather_and_time import BASE_URL, MODEL, QUESTIONS, called, get_time, get_weather


class Verdict(BaseModel):
    """Which of the two it is."""

    kind: Literal["weather", "time"]


async def run(agent: Agent, question: str, history: list, stream: bool):
    if not stream:
        return await agent.run(question, message_history=history)
    async with agent.run_stream(question, message_history=history) as result:
        async for _ in result.stream_text():
            pass
        return result


async def main() -> None:
    # Its name begins as those of OpenAI's o-series, for which temperatures would be left out.
    profile = {"openai_supports_reasoning": False}
    provider = OpenAIProvider(base_url=BASE_URL, api_key="none")
    model = OpenAIChatModel(MODEL, provider=provider, profile=profile)
    settings = {"temperature": 0, "max_tokens": 100}
    agent = Agent(model, tools=[get_weather, get_time], model_settings=settings)
    for stream in (False, True):
        called.clear()
        history: list = []
        for question in QUESTIONS:
            result = await run(agent, question, history, stream)
            history = result.all_messages()
            text = await result.get_output() if stream else result.output
            print(question, "->", text)
        assert called == ["get_weather", "get_time"], called
    for output in (ToolOutput(Verdict), NativeOutput(Verdict)):
        typed = Agent(model, output_type=output, model_settings=settings)
        verdict = (await typed.run(QUESTIONS[0])).output
        print(type(output).__name__, "->", verdict)
        assert isinstance(verdict, Verdict)


if __name__ == "__main__":
    asyncio.run(main())
