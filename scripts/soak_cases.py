"""The requests of a soak: what is asked, over HTTP and of the engine, and what counts as equal.

Everything is drawn from a seed, so that the same catalogue can be run once alone and then again and
again among others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.llm import LLM
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["EngineCase", "HTTPCase", "engine_cases", "folded", "http_cases", "short_cases"]

ADAPTERS = ("red", "blue")
#: Adapters whose files change, and that come and go, while requests use them.
HOT, FLEETING = "hot", "fleeting"

_PREFIXES = (
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path, encoding='utf-8'):\n"
    "        self.path = path\n        self.encoding = encoding\n\n    def read(self):\n",
    '"""Helpers for dates."""\n\nfrom datetime import date, timedelta\n\n\ndef next_day(day):\n',
)
_ENDS = (
    "        with open(", "def join(", "    return ", "for name in ", "class Error(", "assert ",
    "    if not ", "x = [", "try:\n    ", "import ", "raise ValueError(", "print(",
)  # fmt: skip
_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
_GRAMMAR = 'root ::= ("yes" | "no") " " [a-z]+ ("." | "!")'
_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": _SCHEMA},
}


@dataclass(frozen=True, slots=True)
class HTTPCase:
    """A streamed request; ``adapter`` names one that changes meanwhile, if it uses one."""

    kind: str
    path: str
    body: dict[str, Any] = field(hash=False)
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class EngineCase:
    """A request of the engine itself; ``adapter`` as for HTTPCase."""

    kind: str
    request: GenerationRequest
    adapter: str | None = None

    def fresh(self) -> GenerationRequest:
        """The request under another id."""
        return GenerationRequest(
            prompt_token_ids=self.request.prompt_token_ids,
            params=self.request.params,
            adapters=self.request.adapters,
            priority=self.request.priority,
        )


def _prompts(draw: random.Random) -> Iterator[str]:
    """Short ones and long ones; two in three begin with one of two shared texts."""
    while True:
        prefix = draw.choice((*_PREFIXES, ""))
        lines = [draw.choice(_ENDS) + f"{draw.randrange(100)})\n" for _ in range(draw.randrange(9))]
        yield prefix + "".join(lines) + draw.choice(_ENDS)


def http_cases(count: int, seed: int, model: str) -> list[HTTPCase]:
    """``count`` requests of every route and kind in turn."""
    draw = random.Random(seed)
    prompts = _prompts(draw)
    makers = (_native, _plain, _two, _adapters, _hot, _schema, _gbnf, _tools, _fleeting)
    cases = []
    for number in range(count):
        settings = {
            "temperature": draw.choice((0, 0.8)),
            "seed": number,
            "stream": True,
            "model": model,
        }
        maker = makers[number % len(makers)]
        cases.append(maker(next(prompts), draw.randint(1, 48), settings))
    return cases


def _completion(kind: str, body: dict, adapter: str | None = None) -> HTTPCase:
    body = {**body, "stream_options": {"include_usage": True}}
    return HTTPCase(kind, "/v1/completions", body, adapter)


def _native(prompt: str, most: int, settings: dict) -> HTTPCase:
    body = {**settings, "prompt": prompt, "n_predict": most, "return_tokens": True}
    return HTTPCase("native, token ids", "/completion", body)


def _plain(prompt: str, most: int, settings: dict) -> HTTPCase:
    body = {**settings, "prompt": prompt, "max_tokens": most, "logprobs": 2, "ignore_eos": True}
    return _completion("log-probabilities", body)


def _two(prompt: str, most: int, settings: dict) -> HTTPCase:
    body = {**settings, "prompt": prompt, "max_tokens": most, "n": 2, "temperature": 0.9}
    return _completion("n = 2", body)


def _adapters(prompt: str, most: int, settings: dict) -> HTTPCase:
    lora = [{"name": name, "scale": 0.2 + 0.1 * (most % 8)} for name in ADAPTERS]
    return _completion(
        "two adapters", {**settings, "prompt": prompt, "max_tokens": most, "lora": lora}
    )


def _hot(prompt: str, most: int, settings: dict) -> HTTPCase:
    body = {**settings, "prompt": prompt, "max_tokens": most, "lora": HOT}
    return _completion("replaced adapter", body, HOT)


def _fleeting(prompt: str, most: int, settings: dict) -> HTTPCase:
    body = {**settings, "prompt": prompt, "max_tokens": most, "lora": FLEETING}
    return _completion("dropped adapter", body, FLEETING)


def _schema(prompt: str, most: int, settings: dict) -> HTTPCase:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": _SCHEMA}}
    messages = [{"role": "user", "content": prompt}]
    body = {**settings, "messages": messages, "max_tokens": 60, "response_format": form}
    return HTTPCase("JSON schema", "/v1/chat/completions", body)


def _gbnf(prompt: str, most: int, settings: dict) -> HTTPCase:
    body = {**settings, "prompt": prompt, "max_tokens": most, "grammar": _GRAMMAR}
    return _completion("GBNF", body)


def _tools(prompt: str, most: int, settings: dict) -> HTTPCase:
    messages = [{"role": "user", "content": prompt}]
    tools = {"tools": [_TOOL], "tool_choice": "required"}
    body = {**settings, "messages": messages, "max_tokens": 80, **tools}
    return HTTPCase("tools", "/v1/chat/completions", body)


def engine_cases(count: int, seed: int, llm: LLM) -> list[EngineCase]:
    """``count`` requests with sampling settings, priorities, adapters and constraints in turn."""
    draw = random.Random(seed)
    prompts = _prompts(draw)
    schema, gbnf = Constraint.json_schema(_SCHEMA), Constraint("gbnf", _GRAMMAR)
    kinds: list[tuple[str, dict[str, Any], tuple, str | None]] = [
        ("greedy, priority", {"temperature": 0}, (), None),
        ("sampled", {"temperature": 0.9, "top_p": 0.9, "logprobs": 1}, (), None),
        ("penalties", {"temperature": 0.7, "repetition_penalty": 1.3}, (), None),
        ("prompt log-probabilities", {"temperature": 0, "prompt_logprobs": 1}, (), None),
        ("two adapters", {"temperature": 0}, (("red", 0.7), ("blue", -0.3)), None),
        ("replaced adapter", {"temperature": 0}, ((HOT, 1.0),), HOT),
        ("JSON schema", {"temperature": 0.8, "constraint": schema}, (), None),
        ("GBNF", {"temperature": 0.8, "constraint": gbnf}, (), None),
    ]
    cases = []
    for number in range(count):
        kind, options, adapters, adapter = kinds[number % len(kinds)]
        params = SamplingParams(max_tokens=draw.randint(1, 64), seed=number, **options)
        request = GenerationRequest(
            prompt_token_ids=tuple(llm.tokenize(next(prompts))),
            params=params,
            adapters=adapters,
            priority=draw.randrange(3),
        )
        cases.append(EngineCase(kind, request, adapter))
    return cases


def short_cases(count: int, seed: int, llm: LLM) -> list[EngineCase]:
    """``count`` requests of 2 to 24 prompt tokens and 1 to 4 new ones."""
    draw = random.Random(seed)
    starts = [llm.tokenize(prefix) for prefix in _PREFIXES]
    cases = []
    for number in range(count):
        ids = [draw.randrange(300, 600) for _ in range(draw.randint(1, 4))]
        params = SamplingParams(
            temperature=draw.choice((0, 1.0)), seed=number, max_tokens=draw.randint(1, 4)
        )
        request = GenerationRequest(
            prompt_token_ids=tuple(draw.choice(starts)[: draw.randint(1, 20)] + ids),
            params=params,
            adapters=(("red", 1.0),) if number % 8 == 0 else (),
        )
        cases.append(EngineCase("short", request))
    return [replace(case, kind=f"{case.request.params.max_tokens} tokens") for case in cases]


def folded(events: list[dict]) -> dict[str, Any]:
    """What a stream said, whatever the pieces it came in; without what names the answer itself."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in events:
        if "content" in event:  # llama-server's form
            choice = choices.setdefault(0, {"text": "", "ids": [], "end": None})
            choice["text"] += event["content"]
            choice["ids"] += event["tokens"] if not event["stop"] else []
            choice["end"] = event.get("stop_type", choice["end"])
            continue
        for part in event["choices"]:
            empty = {"text": "", "calls": "", "logprobs": [], "end": None}
            choice = choices.setdefault(part["index"], empty)
            delta = part.get("delta", part)
            choice["text"] += delta.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                call = {key: value for key, value in call.items() if key != "id"}
                choice["calls"] += json.dumps(call["function"].get("name")) * (
                    "name" in call["function"]
                ) + call["function"].get("arguments", "")
            choice["logprobs"] += (part.get("logprobs") or {}).get("token_logprobs", [])
            choice["end"] = part.get("finish_reason") or choice["end"]
        if event.get("usage"):
            usage = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
    return {"choices": choices, "usage": usage}
