"""An agent with two tools, by openai-agents: over chat completions and over responses, streamed
and not.

    pip install openai-agents
"""

from __future__ import annotations

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from weather_and_time import BASE_URL, MODEL, QUESTIONS, called, get_time, get_weather


async def run(agent: Agent, history: list, stream: bool):
    if not stream:
        return await Runner.run(agent, history, max_turns=6)
    result = Runner.run_streamed(agent, history, max_turns=6)
    async for _ in result.stream_events():
        pass
    return result


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=BASE_URL, api_key="none")
    tools = [function_tool(get_weather), function_tool(get_time)]
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent(
            name="demo",
            model=kind(model=MODEL, openai_client=client),
            model_settings=ModelSettings(temperature=0, max_tokens=100),
            tools=tools,
        )
        for stream in (False, True):
            called.clear()
            history: list = []
            for question in QUESTIONS:
                history.append({"role": "user", "content": question})
                result = await run(agent, history, stream)
                history = result.to_input_list()
                print(kind.__name__, question, "->", result.final_output)
            assert called == ["get_weather", "get_time"], called


if __name__ == "__main__":
    asyncio.run(main())
