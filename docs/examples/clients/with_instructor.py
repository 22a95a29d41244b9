"""Objects instead of texts with instructor: by a tool call, by a JSON schema, and streamed.

pip install instructor
"""

from __future__ import annotations

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict
from weather_and_time import BASE_URL, MODEL, QUESTIONS, called, get_time, get_weather


class Lookup(BaseModel):
    """What to look up, and for which city."""

    # No further properties: the demo model would not stop inventing them.
    model_config = ConfigDict(extra="forbid")

    function: Literal["get_weather", "get_time"]
    city: Literal["Oslo", "Paris"]


def main() -> None:
    functions = {"get_weather": get_weather, "get_time": get_time}
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 100, "max_retries": 1}
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key="none"), mode=mode)
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            lookup = client.chat.completions.create(
                response_model=Lookup, messages=messages, **fields
            )
            print(mode.value, question, "->", lookup, functions[lookup.function](lookup.city))
        if mode is not instructor.Mode.TOOLS_STRICT:
            partial = client.chat.completions.create_partial(
                response_model=Lookup, messages=messages, **fields
            )
            last = list(partial)[-1]
            print(mode.value, "streamed ->", last)
            assert last.city in ("Oslo", "Paris")
    assert len(called) == 6


if __name__ == "__main__":
    main()
