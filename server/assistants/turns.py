"""From a thread and a run to the turn of a model: history, limits, tools."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from oxillama_torch.chat.prompt import prepare
from oxillama_torch.chat.tool import ToolChoice, tools_from
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.answer import deadline_of
from oxillama_torch.server.assistants.objects import Object
from oxillama_torch.server.output import Generation
from oxillama_torch.server.service import Service
from oxillama_torch.server.turn import Turn, effort_variables

__all__ = ["ThreadTooLong", "begin_turn", "texts_of"]

Adapters = tuple[tuple[str, float], ...]
# Tokens kept free for an answer, where old messages make room.
_ROOM = 256
# Messages that must stay together: a call with its outputs.
Unit = list[dict[str, Any]]


class ThreadTooLong(Exception):  # noqa: N818 (the run says so, it is not failed)
    """Not even the last message fits the run's ``max_prompt_tokens``."""


def begin_turn(
    service: Service,
    adapters: Adapters,
    run: Mapping[str, Any],
    objects: Sequence[Object],
    usage: Mapping[str, int],
) -> Generation:
    """Start the next turn of a run.

    The oldest messages are left out as far as that is needed for the rest to fit.

    Args:
        objects: the thread's messages and steps with tool calls, see ``records.history``.
        usage: tokens of the run so far.

    Raises:
        RequestError, UnsupportedError, CapacityError: as ``turn.start_turn``.
        ThreadTooLong: see there.
    """
    if service.template is None:
        raise UnsupportedError("chat with a model whose file has no chat template")
    units = _wanted(run, objects)
    context, own = service.engine.max_context, run["max_prompt_tokens"]
    limit = min(own or context, context - min(_ROOM, context // 4))
    while True:
        turn = _turn(run, units, usage, adapters)
        prompt = prepare(turn, service.template, service.tokenizer)
        if len(prompt.ids) <= limit:
            break
        if len(units) <= 1:
            if own is not None and len(prompt.ids) > own:
                raise ThreadTooLong
            break  # without that room then, or it is refused for its length
        # More than one at a time: rendering a long thread again and again takes long.
        units = units[max(1, len(units) // 8) :]
    return Generation(
        service, [prompt.ids], prompt.params, _deadline(service, run), adapters, prompt.reply_format
    )


def _wanted(run: Mapping[str, Any], objects: Sequence[Object]) -> list[Unit]:
    units, strategy = _units(objects, run["id"]), run["truncation_strategy"]
    return units[-strategy["last_messages"] :] if strategy["last_messages"] else units


def _turn(
    run: Mapping[str, Any], units: list[Unit], usage: Mapping[str, int], adapters: Adapters
) -> Turn:
    limit = run["max_completion_tokens"]
    tools = tools_from(run["tools"])
    choice = ToolChoice.of(run["tool_choice"] if tools else None, tools)
    if usage["completion_tokens"] and choice.mode == "required":
        choice = ToolChoice("auto")  # calling for ever is not what was meant
    wanted = run["response_format"]
    system = [{"role": "system", "content": run["instructions"]}] if run["instructions"] else []
    return Turn(
        messages=[*system, *(message for unit in units for message in unit)],
        params=SamplingParams(
            max_tokens=None if limit is None else max(0, limit - usage["completion_tokens"]),
            temperature=run["temperature"],
            top_p=run["top_p"],
        ),
        adapters=adapters,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=run["parallel_tool_calls"],
        response_format=None if wanted == "auto" else wanted,
        template_kwargs=effort_variables(run["reasoning_effort"]),
    )


def _deadline(service: Service, run: Mapping[str, Any]) -> float:
    expiry = time.monotonic() + run["expires_at"] - time.time()
    own = deadline_of(service)
    return expiry if own is None else min(expiry, own)


def _units(objects: Sequence[Object], run_id: str) -> list[Unit]:
    """The thread as chat messages; what belongs to the current run stays in one unit."""
    units: list[Unit] = []
    owner: str | None = None
    for item in objects:
        messages = _of_message(item) if item["object"] == "thread.message" else _of_step(item)
        if not messages:
            continue
        same = owner is not None and item["run_id"] == owner
        if same and "tool_calls" in messages[0] and units[-1][-1]["role"] == "assistant":
            # The text before a call and the call are one message.
            units[-1][-1]["tool_calls"] = messages[0]["tool_calls"]
            messages = messages[1:]
        if same and (owner == run_id or messages[0]["role"] == "tool"):
            units[-1] += messages
        else:
            units.append(messages)
        owner = item["run_id"]
    return units


def _of_message(message: Object) -> Unit:
    text = "".join(texts_of(message))
    if message["role"] == "assistant" and not text:
        return []
    return [{"role": message["role"], "content": text}]


def _of_step(step: Object) -> Unit:
    calls = step["step_details"]["tool_calls"]
    if not all(call["function"]["output"] is not None for call in calls):
        return []  # the run ended before its calls were answered
    asked = [
        {**call, "function": {k: call["function"][k] for k in ("name", "arguments")}}
        for call in calls
    ]
    return [
        {"role": "assistant", "content": "", "tool_calls": asked},
        *(
            {"role": "tool", "tool_call_id": call["id"], "content": call["function"]["output"]}
            for call in calls
        ),
    ]


def texts_of(message: Object) -> list[str]:
    """The texts of a message."""
    return [part["text"]["value"] for part in message["content"]]
