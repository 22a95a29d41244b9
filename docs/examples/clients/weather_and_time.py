"""The two functions that the examples beside this file let a model call.

What they return has the form that the demo model was trained on, so that it can tell it.
"""

from __future__ import annotations

import json
import os

__all__ = ["BASE_URL", "MODEL", "QUESTIONS", "called", "get_time", "get_weather"]

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
MODEL = os.environ.get("MODEL", "oxillama-demo-6M")
QUESTIONS = ("What is the weather in Oslo?", "Tell me the time in London.")

#: Names of the functions that have been called.
called: list[str] = []


def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    called.append("get_weather")
    return json.dumps({"city": city, "temperature": 7, "sky": "rainy"})


def get_time(city: str) -> str:
    """Get the local time of a city."""
    called.append("get_time")
    return json.dumps({"city": city, "time": "9:30"})
